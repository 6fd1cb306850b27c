-- The results of polls in the copy of the live counters that is in use at this moment. Returns the copy's position ('':
-- it has none), then of each poll its version and its results: false where the copy has none, or does not have everything
-- yet.
-- KEYS: which copy that is. ARGV: after how many bytes to stop, and the polls: the answer is about the first of them, one
-- at least. The names are those of contracts/live.py.
local copy = 'tally:live:' .. (redis.call('GET', KEYS[1]) or '0') .. ':'
local filling = redis.call('EXISTS', copy .. 'filling') == 1
local answer, bytes = {redis.call('GET', copy .. 'position') or ''}, 0
for i = 2, #ARGV do
    local poll = not filling and redis.pcall('HMGET', copy .. ARGV[i], 'version', 'results')
    -- What is wrong with one poll is no failure of the others.
    local found = type(poll) == 'table' and not poll.err and poll[1] and poll[2]
    answer[#answer + 1] = found and poll[1]
    answer[#answer + 1] = found and poll[2]
    bytes = bytes + (found and #poll[2] or 0)
    if bytes > tonumber(ARGV[1]) then break end
end
return answer
