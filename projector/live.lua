-- Moves polls of a copy to new versions and its position on, and keeps or drops dead letters, all or nothing, and tells
-- the subscribers of each poll. KEYS: which copy it is to be; whether it is frozen; its position; its dead letters;
-- whether it is being filled; then each poll. ARGV: the copy; the position before and after; the channels of all polls
-- ('': nobody is told anything); then of each poll the version before (0: none) and after, the results as readers may see
-- them, what is counted on from where that is something else, and the channel; then of each dead letter its poll, and the
-- letter ('': none any longer). Returns the first key that is not as expected, and then changes nothing.
if (redis.call('GET', KEYS[1]) or '0') ~= ARGV[1] then
    return KEYS[1]
end
if redis.call('EXISTS', KEYS[2]) == 1 then
    return KEYS[2]
end
if (redis.call('GET', KEYS[3]) or '') ~= ARGV[2] then
    return KEYS[3]
end
local at = 5
for i = 6, #KEYS do
    if (redis.call('HGET', KEYS[i], 'version') or '0') ~= ARGV[at] then
        return KEYS[i]
    end
    at = at + 5
end
local begins = ARGV[2] == ''
local told = ARGV[4] ~= '' and not begins and redis.call('EXISTS', KEYS[5]) == 0
if begins then
    -- From nothing: what subscribers have is newer than what it will have for some time.
    redis.call('SET', KEYS[5], '')
    if ARGV[4] ~= '' then
        for _, channel in ipairs(redis.call('PUBSUB', 'CHANNELS', ARGV[4])) do
            redis.call('PUBLISH', channel, '')
        end
    end
end
at = 5
for i = 6, #KEYS do
    local version, results, counted, channel = ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
    redis.call('HSET', KEYS[i], 'version', version, 'results', results, 'counted', counted)
    if told then
        redis.call('PUBLISH', channel, results)
    end
    at = at + 5
end
for i = at, #ARGV, 2 do
    if ARGV[i + 1] == '' then
        redis.call('HDEL', KEYS[4], ARGV[i])
    else
        redis.call('HSET', KEYS[4], ARGV[i], ARGV[i + 1])
    end
end
redis.call('SET', KEYS[3], ARGV[3])
return ''
