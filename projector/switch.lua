-- Puts a fresh copy of the live counters in the place of the one in use, and tells the subscribers of each poll what it
-- has, for it may be ahead. KEYS: which copy is in use; which one is the fresh one; whether the one in use is frozen.
-- ARGV: the copy in use; the fresh one, which has frozen the other; the channels of all polls, as a pattern that ends in
-- *. Returns the first key that is not as expected, and then changes nothing.
if (redis.call('GET', KEYS[1]) or '0') ~= ARGV[1] then
    return KEYS[1]
end
for i = 2, 3 do
    if redis.call('GET', KEYS[i]) ~= ARGV[2] then
        return KEYS[i]
    end
end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('DEL', KEYS[2])
-- The channel of a poll ends in its id, in the place of the *; see contracts/live.py.
for _, channel in ipairs(redis.call('PUBSUB', 'CHANNELS', ARGV[3])) do
    local results = redis.call('HGET', 'tally:live:' .. ARGV[2] .. ':' .. channel:sub(#ARGV[3]), 'results')
    if results then
        redis.call('PUBLISH', channel, results)
    end
end
return ''
