-- Forbids an event that no message of the bus can carry: the relay, which keeps the order, would stop at it for all polls.
-- Not checked for the events that are there: that would read them all, and those are on the bus already.
ALTER TABLE events ADD CONSTRAINT events_fit_the_bus CHECK (octet_length(payload) <= 4 * 1024 * 1024 - 1024) NOT VALID;
