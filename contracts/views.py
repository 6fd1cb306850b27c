"""What the projector and the query servers agree on about the read database, beyond its schema."""

# Turnout is counted by so many seconds: what GetTurnout answers is put together from these.
TURNOUT_GRAIN = 10
