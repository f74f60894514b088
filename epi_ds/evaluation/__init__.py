"""What a model can do: tasks and their scores."""
