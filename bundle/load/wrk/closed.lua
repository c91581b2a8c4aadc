-- Closed loop: each client waits for its answer before it sends the next request. A thread has many clients, because
-- few threads leave most of the CPU to the server. Only wrk knows which answer belongs to which request, so the latencies
-- are measured by wrk.

local clients = dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "clients.lua")
local in_a_thread = tonumber(os.getenv("LOAD_CLIENTS")) / clients.threads

sent, replied, good, in_time, last, silent = 0, 0, 0, 0, 0, 0
local start

function setup(thread)
  if not clients.shared then clients.share({}) end
  clients.add(thread)
end

function request()
  local message, is_trial = clients.message()
  if is_trial then return message end
  start = start or clients.start()
  if clients.now() - start < clients.seconds then
    sent = sent + 1
    return message
  end
  silent = silent + 1
  if silent == in_a_thread then clients.finish() end
  return "" -- nothing is sent, and wrk no longer calls request() for this client
end

function response(status)
  replied = replied + 1
  if status >= 200 and status < 300 then
    good = good + 1
    last = clients.now() - start
    if last <= clients.seconds then in_time = in_time + 1 end
  end
end

-- wrk corrects its histogram {microseconds -> answers} for clients that send at a constant rate: for each latency of
-- twice the mean or more, it adds smaller ones at intervals of the mean. These clients wait for their answers instead,
-- so the correction is removed.
local function seen_latencies(latency, mean)
  local counts, order = {}, {}
  for i = 1, #latency do
    local value, count = latency(i)
    value, count = tonumber(value), tonumber(count)
    order[i], counts[value] = value, count
  end
  for i = #order, 1, -1 do
    local value = order[i]
    if value < 2 * mean then break end
    local below = value - mean
    while below > mean and counts[value] > 0 do
      counts[below] = counts[below] - counts[value]
      below = below - mean
    end
  end
  return order, counts
end

function done(summary, latency)
  local result, errors = { last = 0, longest = 0 }, summary.errors
  for _, thread in ipairs(clients.all) do result.last = math.max(result.last, thread:get("last")) end
  local broken = errors.read + errors.write
  local replies = clients.sum("replied")
  local unanswered = math.max(0, clients.sum("sent") - replies - broken)
  local unconnected = math.max(0, clients.threads * in_a_thread - clients.sum("silent") - unanswered)
  local good_in_all = clients.sum("good")
  result.answered = math.max(0, good_in_all - errors.timeout) -- wrk counts answers that came too late as timeouts
  result.in_time = clients.sum("in_time")
  result.failed = replies - good_in_all + errors.timeout + errors.connect + broken + unanswered + unconnected

  local rounds = math.floor(summary.requests / (clients.threads * in_a_thread)) -- as wrk computes its mean
  local mean = rounds > 0 and math.floor(summary.duration / rounds) or math.huge
  local order, counts = seen_latencies(latency, mean)
  local total, below = 0, 0
  for _, value in ipairs(order) do total = total + counts[value] end
  for _, value in ipairs(order) do
    below = below + counts[value]
    if counts[value] > 0 then result.longest = value / 1e6 end
    for name, share in pairs({ p50 = 0.50, p95 = 0.95, p99 = 0.99 }) do
      if not result[name] and below >= share * total then result[name] = value / 1e6 end
    end
  end
  clients.report(result)
end
