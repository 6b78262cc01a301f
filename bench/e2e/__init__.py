"""Whole steps and whole generations on a real model, against the trainers that people use."""
