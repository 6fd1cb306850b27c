-- Which history of the event log the read model is made from, and whether it has all of it yet.

ALTER TABLE stream_position
    -- The log epoch; a version is compared only with versions of the same epoch. All zero: the log is older than epochs.
    ADD COLUMN log_epoch uuid NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000',
    -- The installation that the event log belongs to; NULL: not known yet. Another one's events are refused.
    ADD COLUMN deployment_id uuid,
    -- The read model began empty and does not have all events yet: what is not found here may exist all the same.
    ADD COLUMN filling boolean NOT NULL DEFAULT false;
