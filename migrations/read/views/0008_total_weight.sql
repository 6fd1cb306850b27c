-- What the counts of a poll are shares of, also where votes have weights.

ALTER TABLE polls
    -- The sum of the weights of the votes that count, each vote once. NULL: not known, for a poll that had votes before
    -- there was this column. To fill it in, rebuild the views.
    ADD COLUMN total_weight bigint;
UPDATE polls SET total_weight = 0 WHERE total_votes = 0;
