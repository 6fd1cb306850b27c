-- The results of polls in the copy of the live counters that is in use at this moment, false where it has none, or does
-- not have everything yet.
-- KEYS: which copy that is. ARGV: after how many bytes to stop, and the polls: the answer is about the first of them, one
-- at least. The names are those of contracts/live.py.
local copy = 'tally:live:' .. (redis.call('GET', KEYS[1]) or '0') .. ':'
local filling = redis.call('EXISTS', copy .. 'filling') == 1
local found, bytes = {}, 0
for i = 2, #ARGV do
    local results = not filling and redis.pcall('HGET', copy .. ARGV[i], 'results')
    -- What is wrong with one poll is no failure of the others.
    found[i - 1] = type(results) == 'string' and results
    bytes = bytes + #(found[i - 1] or '')
    if bytes > tonumber(ARGV[1]) then break end
end
return found
