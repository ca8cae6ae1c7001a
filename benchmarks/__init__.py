"""``make bench``: the budgets of the appliance, each against something measured in the same run."""
