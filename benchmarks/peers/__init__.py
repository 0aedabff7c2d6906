"""What kvcag is compared with, each in a module of its own, and kvcag itself."""
