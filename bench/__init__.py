"""Benchmarks: one registry of workloads, every peer measured interleaved in the same run."""
