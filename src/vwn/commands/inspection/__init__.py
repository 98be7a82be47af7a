"""A look inside a trained model: which sublayer feeds which, how long slots remember, what the routing depends on."""
