-- Keeps who has applied what: a hash of proxy → "end of its lease in server milliseconds, a space, content hash".
--
-- KEYS: that hash. ARGV: report, the proxy, what it has applied, its lease in milliseconds, "1" to forget those whose
-- lease has ended · leave, the proxy · live, the most proxies: returns { proxy, content hash, … }.
-- The server's clock alone counts: those of the proxies may differ. The key ends with the last lease.

local applied, wanted = KEYS[1], ARGV[1]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function lease(value)
    local ends, content = value:match('^(%d+) (%S+)$')
    return tonumber(ends), content
end

if wanted == 'report' then
    redis.call('HSET', applied, ARGV[2], string.format('%.0f %s', now + ARGV[4], ARGV[3]))
    redis.call('PEXPIRE', applied, ARGV[4])
    if ARGV[5] == '1' then
        local all = redis.call('HGETALL', applied)
        for i = 1, #all, 2 do
            local ends = lease(all[i + 1])
            if not ends or ends < now then redis.call('HDEL', applied, all[i]) end
        end
    end
    return redis.status_reply('OK')
end

if wanted == 'leave' then
    redis.call('HDEL', applied, ARGV[2])
    return redis.status_reply('OK')
end

if redis.call('HLEN', applied) > tonumber(ARGV[2]) then
    return redis.error_reply('TOOLARGE ' .. applied .. ' has more fields than there can be proxies')
end
local all, live = redis.call('HGETALL', applied), {}
for i = 1, #all, 2 do
    local ends, content = lease(all[i + 1])
    if ends and ends >= now then
        live[#live + 1] = all[i]
        live[#live + 1] = content
    end
end
return live
