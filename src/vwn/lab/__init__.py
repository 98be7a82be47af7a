"""Compare models and judge the paper's claims."""
