-- Shared by closed.lua and open.lua: the clock, the request's body, a common start, and the end of the run.
-- Each of wrk's threads has its own Lua state; setup() and done() run in another one, the main state. All of them share
-- a block of C memory, whose address setup() gives to the threads.

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
  union { char bytes[64]; long align; } mutex; // all zeros: unlocked
  double start;                                // seconds on the clock; 0 until every thread exists
  int finished;                                // number of threads that are done
  double due[];                                // open loop: seconds after the start, in order
} shared_t;
]]
local MONOTONIC, SIGINT = 1, 2
local C, clock = ffi.C, ffi.new("duration_t")

local clients = {
  threads = tonumber(os.getenv("LOAD_THREADS")),
  seconds = tonumber(os.getenv("LOAD_SECONDS")), -- no client sends after this time; all wait for the requests in flight
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

-- main state: allocate the shared memory; `arrivals` are the times at which requests are due
function clients.share(arrivals)
  local shared = ffi.cast("shared_t *", C.calloc(1, ffi.sizeof("shared_t") + 8 * #arrivals))
  for i, time in ipairs(arrivals) do shared.due[i - 1] = time end
  clients.shared = shared
end

-- main state: add a thread; the last one sets the time of the start
function clients.add(thread)
  table.insert(clients.all, thread)
  thread:set("address", tonumber(ffi.cast("intptr_t", clients.shared)))
  thread:set("is_first", #clients.all == 1)
  if #clients.all == clients.threads then clients.shared.start = clients.now() + 0.3 end
end

-- main state: return the sum of a global variable over the threads
function clients.sum(name)
  local sum = 0
  for _, thread in ipairs(clients.all) do sum = sum + thread:get(name) end
  return sum
end

-- a thread: wait for the start, and return its time. If hundreds of threads checked more often, they would keep the
-- others from starting. By the time that `add` sets, all of them have checked.
function clients.start()
  local shared = clients.shared
  while shared.start == 0 do clients.sleep_until(clients.now() + 0.05) end
  clients.sleep_until(shared.start)
  return shared.start
end

-- a thread: finish; the last one ends wrk, which would otherwise wait until the end of its duration
function clients.finish()
  C.pthread_mutex_lock(clients.shared)
  clients.shared.finished = clients.shared.finished + 1
  local all = clients.shared.finished == clients.threads
  C.pthread_mutex_unlock(clients.shared)
  wrk.thread:stop()
  if all then C.kill(C.getpid(), SIGINT) end
end

-- main state: print the result as one line
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

-- a thread: return the whole request, and whether it is wrk's trial: before the run, wrk calls request() once in the
-- first thread without sending the result
function clients.message()
  if not message then
    message, wrk.body = wrk.request(), nil
  end
  local is_trial = is_first
  is_first = false
  return message, is_trial
end

return clients
