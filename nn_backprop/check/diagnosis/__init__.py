"""Why a gradient is wrong: hypotheses, fitted and ranked."""
