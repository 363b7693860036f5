package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"time"
)

// kind of hostile client. It is let in as a live one, does its worst, and tells whether it was cut off for it.
type kind struct {
	name string
	do   func(*soak) (cut bool, err error)
}

var kinds = []kind{
	{"posted refused joins and false PONGs, and never polled", (*soak).neverPoll},
	{"sent a header without end", (*soak).endlessHeader},
	{"parked polls with many headers", (*soak).manyHeaders},
	{"read no answer of a poll", (*soak).unreadPoll},
	{"read nothing from a WebSocket", (*soak).unreadWebSocket},
	{"connected and let ten connections idle", (*soak).idle},
	{"posted many times at once, byte by byte", (*soak).manyPosts},
	{"began a message and did not finish it", (*soak).unfinished},
	{"flooded", (*soak).flood},
	{"joined a hundred channels by name, left and joined them again, and never polled", (*soak).joinMany},
	{"whispered without end into a channel of many", (*soak).whisper},
}

// kinds that only nginx meets: the daemon itself has no HTTP/2.
var streamKinds = []kind{
	{"parked a hundred polls on one connection by HTTP/2", (*soak).parkStreams},
	{"read no answer of a hundred polls on one connection by HTTP/2", (*soak).unreadStreams},
}

// tally is what became of one kind.
type tally struct{ done, cut int }

const refusedJoin = `420["join-session",{"sessionId":":"}]` // answered twice: an error, and an acknowledgement

// attack is a hostile client's life: one kind after the other, at random after the first. What it suffers is no fault.
func (s *soak) attack(first int, kinds []kind) {
	for next := first % len(kinds); time.Now().Before(s.end); next = rand.IntN(len(kinds)) {
		k, pause := kinds[next], time.Second
		cut, err := k.do(s)
		s.mu.Lock()
		if err != nil {
			s.refused++
			pause *= 5 // what it tries costs itself, too
		} else {
			t := s.hostile[k.name]
			t.done++
			if cut {
				t.cut++
			}
			s.hostile[k.name] = t
		}
		s.mu.Unlock()
		pauseUpTo(min(pause, time.Until(s.end)))
	}
}

// until does something again and again. It reports whether that failed, which is to be cut off, before the soak's end.
func (s *soak) until(every time.Duration, do func() error) (cut bool) {
	for time.Now().Before(s.end) {
		if err := do(); err != nil {
			return time.Now().Before(s.end)
		}
		time.Sleep(every)
	}
	return false
}

// enter connects, and joins the busy room if it is to hear much.
func (s *soak) enter(polls, busy bool) (*client, error) {
	c, err := s.newClient(polls)
	if err == nil {
		err = c.connect()
	}
	if err == nil && busy {
		err = c.emit("join-session", c.membership(s.rooms)) // the answer may come behind much else
	}
	if err != nil && c != nil {
		c.t.leave(false)
	}
	return c, err
}

func (s *soak) neverPoll() (bool, error) {
	c, err := s.enter(true, false)
	if err != nil {
		return false, err
	}
	defer c.t.leave(false)
	c.t.send(strings.Repeat(refusedJoin+"\x1e", 90) + "3")
	return s.until(time.Second, func() error { return c.t.send(strings.Repeat(refusedJoin+"\x1e", 4) + "3") }), nil
}

func (s *soak) endlessHeader() (bool, error) {
	c, err := s.dial()
	if err != nil {
		return false, err
	}
	defer c.Close()
	fmt.Fprintf(c, "GET /socket.io/?EIO=4&transport=polling HTTP/1.1\r\nHost: %s\r\n%s", *addr, strings.Repeat("a: b\r\n", 15<<10/6)) // what the daemon takes is 16 KiB
	return s.until(time.Second, func() error {
		_, err := io.WriteString(c, "a: b\r\n")
		return err
	}), nil
}

func (s *soak) manyHeaders() (bool, error) {
	c, err := s.enter(true, false)
	if err != nil {
		return false, err
	}
	defer c.t.leave(false)
	t := c.t.(*polling)
	header := strings.Repeat("a: b\r\n", [...]int{90, 4000}[rand.IntN(2)])
	return s.until(0, func() error {
		if _, err := fmt.Fprintf(t.polls, "GET %s HTTP/1.1\r\nHost: %s\r\n%s\r\n", t.path, *addr, header); err != nil {
			return err
		}
		_, err := t.polls.answer(s.end)
		return err
	}), nil
}

func (s *soak) unreadPoll() (bool, error) {
	c, err := s.enter(true, true)
	if err != nil {
		return false, err
	}
	defer c.t.leave(false)
	t := c.t.(*polling)
	t.polls.tcp.SetReadBuffer(4096)
	pauseUpTo(5 * time.Second) // for more to wait than the kernel takes
	t.poll()
	return s.until(time.Second, func() error { return t.send("3") }), nil
}

func (s *soak) unreadWebSocket() (bool, error) {
	c, err := s.enter(false, true)
	if err != nil {
		return false, err
	}
	defer c.t.leave(false)
	c.t.(*webSocket).c.tcp.SetReadBuffer(4096)
	return s.until(time.Second, func() error { return c.t.send("3") }), nil
}

// idle opens connections; on some there is a request, or as much as TLS.
func (s *soak) idle() (bool, error) {
	var conns []*conn
	for i := range 10 {
		var c *conn
		var err error
		if i < 5 {
			c, err = dialTCP(s.to, s.from, s.addresses)
		} else if c, err = s.dial(); err == nil && i < 8 {
			err = c.write("GET", "/health", "")
		}
		if err != nil {
			return false, err
		}
		defer c.Close()
		conns = append(conns, c)
	}
	for _, c := range conns {
		c.SetReadDeadline(s.end)
		io.Copy(io.Discard, c) // until it is closed
	}
	return time.Now().Before(s.end), nil
}

func (s *soak) manyPosts() (bool, error) {
	c, err := s.enter(true, false)
	if err != nil {
		return false, err
	}
	defer c.t.leave(false)
	var posts []*conn
	for range 20 {
		p, err := s.dial()
		if err != nil {
			return false, err
		}
		defer p.Close()
		fmt.Fprintf(p, "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Length: 65536\r\n\r\n4%s", c.t.(*polling).path, *addr, strings.Repeat("x", 10000))
		posts = append(posts, p)
	}
	return s.until(100*time.Millisecond, func() (err error) {
		for _, p := range posts {
			if _, failed := p.Write([]byte("x")); failed != nil {
				err = failed
			}
		}
		return err
	}), nil
}

func (s *soak) unfinished() (bool, error) {
	c, err := s.enter(false, false)
	if err != nil {
		return false, err
	}
	defer c.t.leave(false)
	ws := c.t.(*webSocket).c
	io.WriteString(ws, "\x81\xfe\x3e\x80\x00\x00\x00\x004"+strings.Repeat("x", 8000)) // 16,000 bytes were to come
	return s.until(time.Second, func() error {
		_, err := ws.Write([]byte("x"))
		return err
	}), nil
}

func (s *soak) flood() (bool, error) {
	c, err := s.enter(rand.IntN(2) == 0, false)
	if err != nil {
		return false, err
	}
	defer c.t.leave(false)
	return s.until(0, func() error { return c.t.send(refusedJoin) }), nil
}

// channel emits an event about a channel, of the hostile clients' own.
func (c *client) channel(event, name string) string {
	argument, _ := json.Marshal(map[string]any{"channel": name, "auth": sign(c.id + ":" + name), "event": "typing", "data": strings.Repeat("x", 900)})
	return fmt.Sprintf(`42["%s",%s]`, event, argument)
}

func (s *soak) joinMany() (bool, error) {
	c, err := s.enter(true, false)
	if err != nil {
		return false, err
	}
	defer c.t.leave(false)
	at := 0
	return s.until(time.Second, func() error {
		var packets []string
		for range 4 {
			event := "join"
			if at%200 >= 100 {
				event = "leave"
			}
			packets = append(packets, c.channel(event, fmt.Sprintf("private-%s-%d", c.id, at%100)))
			at++
		}
		return c.t.send(strings.Join(packets, "\x1e"))
	}), nil
}

// whisper is in a channel of at most 100, as others of its kind are, and says as much as it may for a while, and then more.
func (s *soak) whisper() (bool, error) {
	c, err := s.enter(rand.IntN(2) == 0, false)
	if err != nil {
		return false, err
	}
	defer c.t.leave(false)
	name := fmt.Sprintf("private-whispers-%d", rand.IntN(8))
	if err := c.t.send(c.channel("join", name)); err != nil {
		return false, err
	}
	said := 0
	return s.until(0, func() error {
		if said++; said < 20 {
			time.Sleep(500 * time.Millisecond)
		}
		return c.t.send(c.channel("whisper", name))
	}), nil
}
