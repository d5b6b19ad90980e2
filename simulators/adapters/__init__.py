"""Parts that every task is made of: tasks, references, and adapters for other kinds of models."""
