-- Polls whose votes and events are in an archive file now: docs/operations.md, "Archiving".

-- When the poll was archived; NULL: it is not. Its rows in `votes` answer no reader any longer, and are gone after the next
-- rebuild of the views.
ALTER TABLE polls ADD COLUMN archived_at timestamptz;
