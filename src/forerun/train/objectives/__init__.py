"""What is trained: losses, the parameters that they move, and how steps of several of them become one."""
