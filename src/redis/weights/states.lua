-- Puts members of a table into a state, or takes them out of it, all or none.
--
-- KEYS, of one slot: the weights (a sorted set), the states (a hash of backends that are not ready). ARGV: the state (ready,
-- drain, maint), then the backends. Returns "done" and for each the state before, or "missing" and those that are neither
-- members nor, where they are to be ready, in another state. For Redis 6.2 and later, Cluster too.

local key, states, state = KEYS[1], KEYS[2], ARGV[1]
local before, missing = { 'done' }, { 'missing' }
for i = 2, #ARGV do
    local held = redis.call('HGET', states, ARGV[i])
    local is_known = redis.call('ZSCORE', key, ARGV[i]) or (state == 'ready' and held)
    if not is_known then missing[#missing + 1] = ARGV[i] end
    before[#before + 1] = held or 'ready'
end
if #missing > 1 then return missing end
for i = 2, #ARGV do
    if state == 'ready' then
        redis.call('HDEL', states, ARGV[i])
    else
        redis.call('HSET', states, ARGV[i], state)
    end
end
return before
