"""Text environments: text in, text out, behind one protocol (`envs.api`)."""
