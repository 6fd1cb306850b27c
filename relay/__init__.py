"""The relay: brings events from the write database's outbox to the stream, in order, and keeps doing so."""
