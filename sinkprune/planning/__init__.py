"""From scores to a plan: criteria, costs, budgets in units or in time."""
