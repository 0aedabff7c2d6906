"""The systems that the report compares, one per module, including kvcag."""
