-- Moves polls to new versions and the position on, and keeps or drops dead letters, all or nothing, and tells the
-- subscribers of each poll. KEYS: the position; the dead letters; then each poll. ARGV: the position before and after;
-- then of each poll the version before (0: none) and after, the results as readers may see them, and what is counted on
-- from where that is something else; then of each dead letter its poll, and the letter ('': none any longer).
-- Returns the first key that is not as expected, and then changes nothing.
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then
    return KEYS[1]
end
for i = 3, #KEYS do
    if (redis.call('HGET', KEYS[i], 'version') or '0') ~= ARGV[4 * i - 9] then
        return KEYS[i]
    end
end
for i = 3, #KEYS do
    redis.call('HSET', KEYS[i], 'version', ARGV[4 * i - 8], 'results', ARGV[4 * i - 7], 'counted', ARGV[4 * i - 6])
    redis.call('PUBLISH', KEYS[i], ARGV[4 * i - 7])
end
for i = 4 * #KEYS - 5, #ARGV, 2 do
    if ARGV[i + 1] == '' then
        redis.call('HDEL', KEYS[2], ARGV[i])
    else
        redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
    end
end
redis.call('SET', KEYS[1], ARGV[2])
return ''
