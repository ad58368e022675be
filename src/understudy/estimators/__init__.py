"""What each objective's expected gradient is, found by writing down every outcome: `understudy estimators`."""
