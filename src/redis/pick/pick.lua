-- Picks a member of the sorted set KEYS[1] with a probability of its score ÷ the sum of the scores of all
-- that are ready.
--
-- ARGV: a uniform number from 0 to 1 (exclusive), a seed from 1 to 2147483646, the largest set that is read
-- whole, how many of the heaviest are read of a larger one, the key of the admin states (a hash beside the
-- set, in its slot), then the members that are not to be picked. Returns the member and its score as texts
-- (a number would lose its fraction), or nil. It only reads, with ZCARD, ZRANGE, HSTRLEN and HGET. Where
-- members are so long that reading them blocks Redis, it answers the error TOOLARGE, and the caller does not
-- ask again soon.
--
-- The key of the states is not among KEYS: Redis would refuse the whole script to a user who may not read
-- it. States that cannot be read count as ready.
--
-- The caller brings the randomness: Redis's own math.random repeats itself on every call (6.2) or after
-- every restart.

local key, point, seed = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
local whole, heaviest, states = tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local tried = {}
for i = 6, #ARGV do tried[ARGV[i]] = true end

-- The most picks that are discarded, because the member is in drain or the pick missed the list.
local most_tries = 64

-- No address is longer (a name has 253 bytes, a unix socket's path 107), and 500 of them have fewer bytes
-- together.
local longest, most_bytes = 300, 262144

local function too_large(members)
    local bytes = 0
    for i = 1, #members, 2 do bytes = bytes + #members[i] end
    return bytes > most_bytes and redis.error_reply('TOOLARGE the members are too long to be picked from')
end

-- A negative or infinite score is not a valid weight, and what cannot be an address is no backend.
local function weight(member, score)
    local number = tonumber(score)
    if number and number > 0 and number < math.huge and #member <= longest and not tried[member]
        and (member:find(':%d+$') or member:sub(1, 5) == 'unix:') then
        return number
    end
    return 0
end

-- Asked only for a member that would be picked: few members of a pool are not ready. The length is asked
-- first, since the value may be anything.
local function is_ready(member)
    if redis.pcall('HSTRLEN', states, member) ~= 5 then return true end
    local state = redis.pcall('HGET', states, member)
    return state ~= 'drain' and state ~= 'maint'
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

-- The position of `target` in the list, whose weights sum up to `total`.
local function place(target)
    local last
    for i = 1, #list, 2 do
        if weights[i] > 0 then
            last = i
            if target < weights[i] then break end
            target = target - weights[i]
        end
    end
    return last
end

local function leave_out(i)
    total = math.max(total - weights[i], 0)
    weights[i] = 0
end

-- A list that is not full holds every member that has a weight.
local is_all = size <= whole or #list < 2 * heaviest

-- A large set is not read whole: that would block Redis for a millisecond per thousand members. No member
-- outside the list weighs more than the lightest in it. So each rank of the set gets that much room, and a
-- member that is hit there is taken with the probability of its weight ÷ that room, unless the list has it
-- already. That is the same distribution, with some picks discarded.
local room, listed = 0, {}
if not is_all then
    room = tonumber(list[#list])
    if largest == 0 then largest = room end
    room = room / largest
    for i = 1, #list, 2 do listed[list[i]] = true end
end
for _ = 1, most_tries do
    local target = point * (total + size * room)
    if target < total or is_all then
        local i = place(target)
        if not i then return false end
        if is_ready(list[i]) then return { list[i], list[i + 1] } end
        leave_out(i)
    else
        local rank = math.min(math.floor((target - total) / room), size - 1)
        local hit = redis.call('ZRANGE', key, rank, rank, 'WITHSCORES')
        refusal = too_large(hit)
        if refusal then return refusal end
        if hit[1] and not listed[hit[1]] and uniform() * room < weight(hit[1], hit[2]) / largest
            and is_ready(hit[1]) then
            return hit
        end
    end
    point = uniform()
end
return false
