"""What is published: the model folder, its card and upload, GGUF, and what runtimes load."""
