-- Picks a member of the sorted set KEYS[1] with a probability of its score ÷ the sum of the scores.
--
-- ARGV: a uniform number from 0 to 1 (exclusive), a seed from 1 to 2147483646, the largest set that is read whole, how
-- many of the heaviest are read of a larger one, then the members that are not to be picked. Returns the member and its
-- score as texts (a number would lose its fraction), or nil. Reads only, with ZCARD and ZRANGE. Where members are so long that
-- reading them blocks Redis, it answers the error TOOLARGE, and is not to be asked again soon.
--
-- The caller brings the randomness: Redis's own math.random repeats itself on every call (6.2) or after every restart.

local key, point, seed = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
local whole, heaviest = tonumber(ARGV[3]), tonumber(ARGV[4])
local tried = {}
for i = 5, #ARGV do tried[ARGV[i]] = true end

-- No address is longer (a name has 253 bytes, a unix socket's path 107), and 500 of them have fewer bytes together.
local longest, most_bytes = 300, 262144

local function too_large(members)
    local bytes = 0
    for i = 1, #members, 2 do bytes = bytes + #members[i] end
    return bytes > most_bytes and redis.error_reply('TOOLARGE the members are too long to be picked from')
end

-- A negative or infinite score is no weight, and what cannot be an address is no backend.
local function weight(member, score)
    local number = tonumber(score)
    if number and number > 0 and number < math.huge and #member <= longest and not tried[member]
        and (member:find(':%d+$') or member:sub(1, 5) == 'unix:') then
        return number
    end
    return 0
end

-- The generator of Park and Miller: its products are exact in a double.
local function uniform()
    seed = (seed * 16807) % 2147483647
    return seed / 2147483647
end

local size = redis.call('ZCARD', key)
local list
if size <= whole then
    list = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
else
    list = redis.call('ZRANGE', key, '(+inf', '(0', 'BYSCORE', 'REV', 'LIMIT', 0, heaviest, 'WITHSCORES')
end
if #list == 0 then return false end
local refusal = too_large(list)
if refusal then return refusal end

-- Dividing by the largest weight keeps the sum of huge weights finite.
local weights, largest, total = {}, 0, 0
for i = 1, #list, 2 do
    weights[i] = weight(list[i], list[i + 1])
    if weights[i] > largest then largest = weights[i] end
end
for i = 1, #list, 2 do
    if largest > 0 then weights[i] = weights[i] / largest end
    total = total + weights[i]
end

local function from_list(target)
    local last
    for i = 1, #list, 2 do
        if weights[i] > 0 then
            last = i
            if target < weights[i] then break end
            target = target - weights[i]
        end
    end
    return last and { list[last], list[last + 1] }
end

-- A list that is not full holds every member that has a weight.
if size <= whole or #list < 2 * heaviest then return from_list(point * total) end

-- A large set is not read whole: that would block Redis for a millisecond per thousand members. No member outside the
-- list weighs more than the lightest in it, so each rank of the set gets that much room, and what is hit there is taken
-- with the probability of its weight ÷ that room, unless the list has it already: the same distribution, for some misses.
local room = tonumber(list[#list])
if largest == 0 then largest = room end
room = room / largest
local listed = {}
for i = 1, #list, 2 do listed[list[i]] = true end
for _ = 1, 64 do
    local target = point * (total + size * room)
    if target < total then return from_list(target) end
    local rank = math.min(math.floor((target - total) / room), size - 1)
    local hit = redis.call('ZRANGE', key, rank, rank, 'WITHSCORES')
    refusal = too_large(hit)
    if refusal then return refusal end
    if hit[1] and not listed[hit[1]] and uniform() * room < weight(hit[1], hit[2]) / largest then return hit end
    point = uniform()
end
return false
