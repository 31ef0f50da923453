"""Agents on the host: clients of language models, tools, and the loop that runs episodes."""
