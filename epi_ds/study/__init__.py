"""What protection buys: arms of one recipe over seeds and targets, compared at equal new-task score."""
