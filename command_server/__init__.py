"""The write side: takes commands and votes, and makes them durable."""
