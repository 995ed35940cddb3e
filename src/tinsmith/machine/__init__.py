"""What the process needs to know of its machine: processor, memory, heap, clock."""
