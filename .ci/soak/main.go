// Command soak has clients come and go on a chat daemon for a while, then checks that it is as it was before.
//
//	go run . -addr 127.0.0.1:3001 -pid $(pidof socketio) -clients 2000 -duration 2m
//
// Each client connects by raw WebSocket or raw polling (some upgrade), joins, changes rooms, and goes: it
// closes, reloads, resets its connection, hangs up without a word, stops reading and never closes, or never
// gets as far as to connect. Meanwhile messages are posted to /broadcast, numbered in each room, so that each
// client can tell that it hears all of its rooms' messages, once, in order, and nobody else's.
//
// Beside them are hostile clients, -hostile of them for each 100. Each does one of these, until it is cut off or gives up,
// and then another: it posts joins that are refused and never polls; sends a header without end, or polls with many
// headers; does not read the answer to its poll, or its WebSocket, in a room that gets 30 KB a second; lets connections
// idle; posts many times at once, byte by byte; begins a WebSocket message and does not finish it; or floods. What they
// suffer is no fault. That in two minutes none of a kind is cut off is one, and that their room's live members miss a message.
//
// At the end, with the vanished clients' sockets still open on this side, connections, sessions and admins
// (/health) and the file descriptors of the process have to be where they began, and the resident memory may
// have grown by less than 2 % in the last third. It exits with 1 if not, and prints figures in either case.
// In less than about two minutes the memory is still finding its level: the silent ones alone stay for 45 s.
package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

var (
	addr     = flag.String("addr", "127.0.0.1:3001", "the daemon's host:port, on loopback")
	pid      = flag.Int("pid", 0, "its process id")
	secret   = flag.String("secret", "", "its SOCKETIO_SECRET, if it has one")
	clients  = flag.Int("clients", 2000, "clients at a time")
	duration = flag.Duration("duration", 2*time.Minute, "how long they come and go")
	hostile  = flag.Int("hostile", 5, "percent: hostile clients, beside those")
	rate     = flag.Int("rate", 200, "messages a second")
	life     = flag.Duration("life", 10*time.Second, "how long a client stays, on average")
	gone     = flag.Duration("gone", time.Minute, "within which everything has to be as it was")
	growth   = flag.Float64("growth", 2, "percent by which resident memory may grow in the last third")
)

const (
	perRoom    = 10        // clients in a session room, on average
	text, long = 100, 3000 // bytes of a message, and of one to the busy room
	busyRate   = 10        // of these a second
)

func main() {
	flag.Parse()
	runtime.GOMAXPROCS(1) // the other core is the daemon's
	what := run
	if *front != "" {
		what = besiege
	}
	if err := what(); err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
	fmt.Println("soak: ok")
}

func run() error {
	before, err := look()
	if err != nil {
		return err
	}
	fmt.Printf("before: %v\n", before)

	s := newSoak(*duration, max(publishers, *clients/perRoom))
	s.to, s.from, s.addresses = *addr, "127.0.0.1", 20
	var wg sync.WaitGroup
	for i := range *clients {
		wg.Go(func() {
			// Not all at once: a minute's soak is not about storms.
			time.Sleep(time.Duration(i) * 5 * time.Second / time.Duration(*clients))
			for time.Now().Before(s.end) {
				s.live()
			}
		})
	}
	for p := range publishers {
		wg.Go(func() { s.publishSome(p, *rate) })
	}
	enemies := *clients * *hostile / 100
	for i := range enemies {
		wg.Go(func() { s.attack(i, kinds) })
	}
	if enemies > 0 {
		wg.Go(func() { s.publish(time.Second/busyRate, long, func() int { return s.rooms }) })
	}
	memory := s.watch()
	wg.Wait()
	last, err := look()
	if err != nil {
		return err
	}
	fmt.Printf("at the end: %v\n", last)

	// Everyone who could say goodbye has. The rest is for the daemon to find out.
	left := time.Now()
	after := last
	for !after.same(before) && time.Since(left) < *gone {
		time.Sleep(200 * time.Millisecond)
		if after, err = look(); err != nil {
			return err
		}
	}
	fmt.Printf("%.1f s later: %v\n", time.Since(left).Seconds(), after)
	close(s.over)
	s.vanished.Wait()
	return s.judge(before, after, memory)
}

// soak is what goes on, and what was counted.
type soak struct {
	end   time.Time
	rooms int // of equal rates; one more is busy

	to, from  string // where clients connect to, and the first of their addresses
	addresses int
	tls       *tls.Config // nil: without

	posts, handed, read atomic.Int64 // messages; the last two at their members
	vanished            sync.WaitGroup
	over                chan struct{} // closed when the daemon has had its time
	stopped             atomic.Bool   // nothing more is published
	clocked             bool          // the messages' times are kept

	mu      sync.Mutex
	posted  map[int]int      // messages, by room
	times   clock            // of the messages
	ends    map[string]int   // how many clients came and went how
	faults  map[string]int   // what no client should have seen
	hostile map[string]tally // what the hostile ones did
	refused int              // how often they were not even let in
}

func newSoak(duration time.Duration, rooms int) *soak {
	return &soak{end: time.Now().Add(duration), rooms: rooms, posted: make(map[int]int), over: make(chan struct{}),
		ends: make(map[string]int), faults: make(map[string]int), hostile: make(map[string]tally)}
}

func (s *soak) count(end string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ends[end]++
}

func (s *soak) fault(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.faults) < 20 || s.faults[err.Error()] > 0 {
		s.faults[err.Error()]++
	} else {
		s.faults["others"]++
	}
}

// vanish leaves a connection open and never touches it again, until the daemon has to have ended it.
func (s *soak) vanish(c *conn) {
	s.vanished.Go(func() {
		defer c.Close()
		select {
		case <-time.After(*gone):
		case <-s.over:
		}
		c.SetReadDeadline(time.Now().Add(time.Second))
		if _, err := io.Copy(io.Discard, c.r); errors.Is(err, os.ErrDeadlineExceeded) {
			s.fault(errors.New("the connection of a client that has vanished is still open"))
		}
	})
}

// watch prints the daemon's state now and then, and returns its resident memory, once a second.
func (s *soak) watch() (memory []float64) {
	for tick := time.NewTicker(time.Second); time.Now().Before(s.end); <-tick.C {
		st, err := look()
		if err != nil {
			s.fault(err)
			continue
		}
		memory = append(memory, st.rss)
		if len(memory)%max(1, int(duration.Seconds())/12) == 0 {
			fmt.Printf("%4d s: %v, %d posts, %d read\n", len(memory), st, s.posts.Load(), s.read.Load())
		}
	}
	return memory
}

func (s *soak) judge(before, after state, memory []float64) error {
	var wrong []string
	names := make([]string, 0, len(s.ends))
	for name := range s.ends {
		names = append(names, name)
	}
	sort.Strings(names)
	for i, name := range names {
		names[i] = fmt.Sprintf("%d %s", s.ends[name], name)
	}
	fmt.Printf("clients: %s\n", strings.Join(names, ", "))
	for _, k := range kinds {
		t := s.hostile[k.name]
		fmt.Printf("hostile clients: %4d %s; %d cut off\n", t.done, k.name, t.cut)
		if t.done > 0 && t.cut == 0 && *duration >= 2*time.Minute {
			wrong = append(wrong, "of the hostile clients nobody was cut off who "+k.name)
		}
	}
	fmt.Printf("hostile clients: %4d not let in\n", s.refused)
	fmt.Printf("messages: %d posted (%.0f a second), %d handed to clients, %d read by them\n",
		s.posts.Load(), float64(s.posts.Load())/duration.Seconds(), s.handed.Load(), s.read.Load())
	for fault, n := range s.faults {
		wrong = append(wrong, fmt.Sprintf("%d × %s", n, fault))
	}
	if s.read.Load() == 0 || len(s.ends) < len(ways) { // each way at least
		wrong = append(wrong, "not everything was tried: let it run for longer")
	}
	if !after.same(before) {
		wrong = append(wrong, fmt.Sprintf("after %v it has %v, and began with %v", *gone, after, before))
	}
	third := memory[len(memory)*2/3:]
	// Peaks, since between two collections the heap goes up and down by some percent.
	trend := (highest(third)/highest(memory[:len(memory)-len(third)]) - 1) * 100
	fmt.Printf("resident memory: %.1f MB at most; in the last third %.1f to %.1f MB, %+.2f %%\n",
		highest(memory), third[0], third[len(third)-1], trend)
	if trend >= *growth {
		wrong = append(wrong, fmt.Sprintf("resident memory grew by %.2f %% in the last third", trend))
	}
	if wrong != nil {
		return fmt.Errorf("%s", strings.Join(wrong, "\n      "))
	}
	return nil
}

func highest(samples []float64) (most float64) {
	for _, sample := range samples {
		most = max(most, sample)
	}
	return most
}

// Posting

// publishers post, each to rooms of its own, so that the order in a room is theirs. One more has the busy room.
const publishers = 4

func (s *soak) publishSome(p, rate int) {
	s.publish(time.Second*publishers/time.Duration(rate), text, func() int {
		return rand.IntN((s.rooms+publishers-1-p)/publishers)*publishers + p
	})
}

func (s *soak) publish(every time.Duration, size int, next func() int) {
	var c *conn
	tick := time.NewTicker(every)
	for range tick.C {
		if time.Now().After(s.end) || s.stopped.Load() {
			return
		}
		room := next()
		s.mu.Lock()
		n := s.posted[room]
		s.mu.Unlock()
		body := fmt.Sprintf(`{"channel":"chat-session.%d","event":"message.sent","data":{"room":%d,"n":%d,"at":%d,"text":"%s"}}`,
			room, room, n, time.Now().UnixMicro(), strings.Repeat("x", size))
		if c == nil {
			var err error
			if c, err = dialDaemon(); err != nil {
				s.fault(fmt.Errorf("post: %w", err))
				return
			}
			defer c.Close()
		}
		answer, err := c.request("POST", "/broadcast", body, time.Now().Add(10*time.Second))
		var result struct{ Delivered int64 }
		if err == nil {
			err = json.Unmarshal(answer, &result)
		}
		if err != nil {
			s.fault(fmt.Errorf("post: %w", err))
			return
		}
		s.mu.Lock()
		s.posted[room]++
		s.mu.Unlock()
		s.posts.Add(1)
		s.handed.Add(result.Delivered)
	}
}

func sign(text string) string {
	mac := hmac.New(sha256.New, []byte(*secret))
	mac.Write([]byte(text))
	return hex.EncodeToString(mac.Sum(nil))
}

// The daemon from outside

// state is what has to be as it was.
type state struct {
	Connections, Sessions, Admins int
	Dropped                       int
	files                         int
	rss                           float64 // MB
	cpu                           float64 // seconds since it started
}

func (s state) same(as state) bool {
	return s.Connections == as.Connections && s.Sessions == as.Sessions && s.Admins == as.Admins && s.files == as.files
}

func (s state) String() string {
	return fmt.Sprintf("%d connections, %d sessions, %d admins, %d files, %.1f MB, %.1f s of CPU", s.Connections, s.Sessions, s.Admins, s.files, s.rss, s.cpu)
}

// look asks /health on a connection that is closed before the files are counted, by either side.
func look() (st state, err error) {
	c, err := dialDaemon()
	if err != nil {
		return st, err
	}
	body, err := c.request("GET", "/health", "", time.Now().Add(10*time.Second))
	c.Close()
	if err != nil {
		return st, fmt.Errorf("/health: %w", err)
	}
	if err := json.Unmarshal(body, &st); err != nil {
		return st, fmt.Errorf("/health: %w", err)
	}
	time.Sleep(20 * time.Millisecond)
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", *pid))
	if err != nil {
		return st, err
	}
	st.files = len(files)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", *pid))
	if err != nil {
		return st, err
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", *pid))
	if err != nil {
		return st, err
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	for _, field := range fields[11:13] { // user and system, in ticks of 10 ms (proc(5))
		ticks, _ := strconv.ParseFloat(field, 64)
		st.cpu += ticks / 100
	}
	var size, resident float64
	fmt.Sscan(string(status), &size, &resident)
	st.rss = resident * float64(os.Getpagesize()) / 1e6
	return st, nil
}
