"""Forecasting for people with a table: fit, predict quantiles, backtest, stream. The models are in `rookery.models`."""
