"""One module per op: its workloads and their peers."""
