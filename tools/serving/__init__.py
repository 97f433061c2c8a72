"""The HTTP server of `steadfast serve`: protocol, limits, and the engine behind them."""
