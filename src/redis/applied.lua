-- Keeps who has applied what: a hash of proxy → "end of its lease in server milliseconds, a space, content hash". Its field
-- SINCE tells when a proxy last came back to it: who looks earlier than all can have done so may not see all.
--
-- KEYS: that hash. ARGV: report, the proxy, what it has applied, its lease in milliseconds, "1" to forget those whose
-- lease has ended, "first" in this proxy's life or "again" over another connection or "" · leave, the proxy · live, the
-- most proxies, a lease, within which time of it all that are alive report again: returns { milliseconds until these are
-- known to be all, proxy, what it has applied, how many milliseconds ago it said so, … }.
-- The server's clock alone counts: those of the proxies may differ. The key ends with the last lease.

local applied, wanted = KEYS[1], ARGV[1]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- No proxy's name.
local SINCE = 'since'

local function lease(value)
    local ends, content = value:match('^(%d+) (%S+)$')
    return tonumber(ends), content
end

if wanted == 'report' then
    local is_added = redis.call('HSET', applied, ARGV[2], string.format('%.0f %s', now + ARGV[4], ARGV[3])) == 1
    redis.call('PEXPIRE', applied, ARGV[4])
    -- The server was away, or has lost this one's report. One that starts says nothing of the others.
    local is_back = ARGV[6] == 'again' or is_added and ARGV[6] ~= 'first'
    if ARGV[5] == '1' then
        local all, has_since = redis.call('HGETALL', applied), false
        for i = 1, #all, 2 do
            local ends = lease(all[i + 1])
            if all[i] == SINCE then
                has_since = true
            elseif not ends or ends < now then
                redis.call('HDEL', applied, all[i])
            end
        end
        is_back = is_back or not has_since
    end
    if is_back then redis.call('HSET', applied, SINCE, string.format('%.0f', now)) end
    return redis.status_reply('OK')
end

if wanted == 'leave' then
    redis.call('HDEL', applied, ARGV[2])
    return redis.status_reply('OK')
end

if redis.call('HLEN', applied) > tonumber(ARGV[2]) then
    return redis.error_reply('TOOLARGE ' .. applied .. ' has more fields than there can be proxies')
end
local length, patience = tonumber(ARGV[3]), tonumber(ARGV[4])
local all, live, wait = redis.call('HGETALL', applied), {}, patience
for i = 1, #all, 2 do
    local ends, content = lease(all[i + 1])
    if all[i] == SINCE then
        local age = now - (tonumber(all[i + 1]) or now)
        wait = age >= 0 and patience - age or patience
    elseif ends and ends >= now then
        live[#live + 1] = all[i]
        live[#live + 1] = content
        live[#live + 1] = string.format('%.0f', math.max(now - (ends - length), 0))
    end
end
for i = 1, #all, 2 do
    -- A report that should have been renewed by now: the server was away, or the proxy is gone. Others may be, too.
    local ends = lease(all[i + 1])
    if ends and ends >= now and ends - length + patience < now then wait = math.max(wait, ends - now + 1) end
end
table.insert(live, 1, math.max(wait, 0))
return live
