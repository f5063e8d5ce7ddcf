"""Side by side with other loaders: seconds and memory, each contender in a process of its own."""
