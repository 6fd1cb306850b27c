-- Moves polls to new versions and the position on, all or nothing, and tells the subscribers of each poll.
-- KEYS: the position; then each poll. ARGV: the position before and after; then of each poll the version before (0:
-- none) and after, the results as readers may see them, and what is counted on from where that is something else.
-- Returns the first key that is not as expected, and then changes nothing.
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then
    return KEYS[1]
end
for i = 2, #KEYS do
    if (redis.call('HGET', KEYS[i], 'version') or '0') ~= ARGV[4 * i - 5] then
        return KEYS[i]
    end
end
for i = 2, #KEYS do
    redis.call('HSET', KEYS[i], 'version', ARGV[4 * i - 4], 'results', ARGV[4 * i - 3], 'counted', ARGV[4 * i - 2])
    redis.call('PUBLISH', KEYS[i], ARGV[4 * i - 3])
end
redis.call('SET', KEYS[1], ARGV[2])
return ''
