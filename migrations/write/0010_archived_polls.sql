-- Polls that were archived: their votes and most of their events are in a file, no longer here. docs/adr/0023.

-- The version of the event that holds all that the events before it come to, so that they can be removed; 0: there is none.
ALTER TABLE polls ADD COLUMN snapshot_version bigint NOT NULL DEFAULT 0;
