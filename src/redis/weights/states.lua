-- Puts members of a table into a state, or takes them out of it: all of them, or none.
--
-- KEYS, of one slot: the weights (a sorted set), the states (a hash of backends that are not ready). ARGV:
-- the state (ready, drain, maint), then the backends. Returns "done" and the previous state of each; or
-- "missing" and the backends that are neither members nor, where they are to be ready, in another state; or
-- "refused", a command, its key and why Redis refuses it. For Redis 6.2 and later, also as a Cluster.

local key, states, state = KEYS[1], KEYS[2], ARGV[1]
-- A longer value is no state: other clients can write 512 MB.
local LONGEST_STATE = 32

-- Ends the script, and returns the command and the key, which Redis's own messages lack.
local function call(command, target, ...)
    local answer = redis.pcall(command, target, ...)
    if type(answer) == 'table' and answer.err then error({ 'refused', command, target, answer.err }, 0) end
    return answer
end

-- Returns the state of `member`, nil where it has none. Users with the rights of an earlier version may
-- only HGET.
local function state_of(member)
    local length = redis.pcall('HSTRLEN', states, member)
    if type(length) == 'number' and length > LONGEST_STATE then return 'unknown' end
    return call('HGET', states, member) or nil
end

local function run()
    local before, missing = { 'done' }, { 'missing' }
    for i = 2, #ARGV do
        local held = state_of(ARGV[i])
        local is_known = call('ZSCORE', key, ARGV[i]) or (state == 'ready' and held)
        if not is_known then missing[#missing + 1] = ARGV[i] end
        before[#before + 1] = held or 'ready'
    end
    if #missing > 1 then return missing end
    for i = 2, #ARGV do
        if state == 'ready' then
            call('HDEL', states, ARGV[i])
        else
            call('HSET', states, ARGV[i], state)
        end
    end
    return before
end

local done, result = pcall(run)
if done or type(result) == 'table' and result[1] == 'refused' then return result end
return redis.error_reply(tostring(result))
