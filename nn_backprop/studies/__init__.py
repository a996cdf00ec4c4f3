"""What studies over seeds share."""
