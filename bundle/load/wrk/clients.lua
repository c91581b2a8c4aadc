-- What closed.lua and open.lua share: the clock, the body, a common start, and the end of the run.
-- wrk gives every thread a Lua state of its own and calls setup() and done() in another, the main one; what all of them
-- see is a piece of C memory, whose address setup() hands round.

local ffi = require("ffi")
ffi.cdef [[
typedef struct { long seconds, nanoseconds; } duration_t;
int clock_gettime(int clock, duration_t *time);
int nanosleep(const duration_t *wanted, duration_t *left);
int pthread_mutex_lock(void *mutex);
int pthread_mutex_unlock(void *mutex);
void *calloc(size_t count, size_t size);
int getpid(void);
int kill(int pid, int signal);
typedef struct {
  union { char bytes[64]; long align; } mutex; // all zero is an unlocked one
  double start;                                // seconds on the clock; 0 until every thread is there
  int finished, taken;                         // threads; arrivals
  double due[];                                // open loop: seconds after the start, in order
} shared_t;
]]
local MONOTONIC, SIGINT = 1, 2
local C, clock = ffi.C, ffi.new("duration_t")

local clients = {
  threads = tonumber(os.getenv("LOAD_THREADS")),
  seconds = tonumber(os.getenv("LOAD_SECONDS")), -- no client sends after them; all wait for what is on its way
  timeout = tonumber(os.getenv("LOAD_TIMEOUT")),
  all = {},                                      -- the threads, in the main state
}

function clients.now()
  C.clock_gettime(MONOTONIC, clock)
  return tonumber(clock.seconds) + tonumber(clock.nanoseconds) * 1e-9
end

function clients.sleep_until(time)
  local left = time - clients.now()
  if left > 0 then
    local whole = math.floor(left)
    C.nanosleep(ffi.new("duration_t", whole, (left - whole) * 1e9), nil)
  end
end

-- main state: `arrivals` are the times at which requests are due
function clients.share(arrivals)
  local shared = ffi.cast("shared_t *", C.calloc(1, ffi.sizeof("shared_t") + 8 * #arrivals))
  for i, time in ipairs(arrivals) do shared.due[i - 1] = time end
  clients.shared = shared
end

-- main state: one more thread
function clients.add(thread)
  table.insert(clients.all, thread)
  thread:set("address", tonumber(ffi.cast("intptr_t", clients.shared)))
  thread:set("is_first", #clients.all == 1)
  if #clients.all == clients.threads then clients.shared.start = clients.now() + 0.3 end
end

-- main state: the sum of a global of the threads
function clients.sum(name)
  local sum = 0
  for _, thread in ipairs(clients.all) do sum = sum + thread:get(name) end
  return sum
end

-- a thread: the time of the start, when it has come. Hundreds of threads that looked more often would keep the others
-- from starting; all have looked by the time that `add` sets.
function clients.start()
  local shared = clients.shared
  while shared.start == 0 do clients.sleep_until(clients.now() + 0.05) end
  clients.sleep_until(shared.start)
  return shared.start
end

-- a thread: the index of the next arrival, which nobody else has
function clients.take()
  C.pthread_mutex_lock(clients.shared)
  local index = clients.shared.taken
  clients.shared.taken = index + 1
  C.pthread_mutex_unlock(clients.shared)
  return index
end

-- a thread: it is done; the last one ends wrk, which would sleep to the end of its time
function clients.finish()
  C.pthread_mutex_lock(clients.shared)
  clients.shared.finished = clients.shared.finished + 1
  local all = clients.shared.finished == clients.threads
  C.pthread_mutex_unlock(clients.shared)
  wrk.thread:stop()
  if all then C.kill(C.getpid(), SIGINT) end
end

-- main state: the result, as one line
function clients.report(result)
  local fields = {}
  for name, value in pairs(result) do table.insert(fields, string.format('"%s": %.9g', name, value)) end
  print("LOAD {" .. table.concat(fields, ", ") .. "}")
end

local file = io.open(os.getenv("LOAD_BODY"), "rb")
wrk.method, wrk.body = "POST", file:read("*a")
file:close()

function init()
  clients.shared = ffi.cast("shared_t *", address)
end

local message

-- what to send: the whole request. wrk asks for it once before the run, in the first thread, to look at it; then the
-- second value is true
function clients.message()
  if not message then
    message, wrk.body = wrk.request(), nil
  end
  local is_trial = is_first
  is_first = false
  return message, is_trial
end

return clients
