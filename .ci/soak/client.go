package main

import (
	"bufio"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

const patience = 10 * time.Second // for what is answered at once

// ways to go, each as often as its share says, and what a client does then.
var ways = []struct {
	name  string
	share int
	end   func(*client)
}{
	{"closed", 30, func(c *client) { c.check(c.t.goodbye()) }},
	{"reloaded", 25, func(c *client) { c.t.leave(false) }},
	{"hung up", 15, func(c *client) { c.t.leave(false); pauseUpTo(time.Second) }},
	{"reset", 15, func(c *client) { c.t.leave(true); pauseUpTo(time.Second) }},
	{"stopped reading", 5, func(c *client) { c.t.vanish(c.s) }},
	{"never joined the namespace", 5, nil},
	{"never sent a request", 5, nil},
}

// live is one client's life: it comes, stays and goes.
func (s *soak) live() {
	pick, way := rand.IntN(100), 0
	for pick >= ways[way].share {
		pick -= ways[way].share
		way++
	}
	name := ways[way].name
	defer func() { s.count(name) }()
	if name == "never sent a request" {
		c, err := s.dial()
		if err != nil {
			s.fault(err)
			return
		}
		io.WriteString(c, [...]string{"", "GET /socket.io/?EIO=4"}[rand.IntN(2)])
		s.vanish(c)
		pauseUpTo(time.Second)
		return
	}

	kind := [...]string{"by WebSocket", "by polling", "by polling, then WebSocket"}[rand.IntN(3)]
	c, err := s.newClient(kind != "by WebSocket")
	if err == nil && name == "never joined the namespace" {
		c.t.vanish(s)
		pauseUpTo(time.Second)
		return
	}
	if err == nil {
		err = c.stay(kind == "by polling, then WebSocket")
	}
	if err != nil {
		s.fault(fmt.Errorf("%s: %w", kind, err))
		if c != nil {
			c.t.leave(false)
		}
		return
	}
	ways[way].end(c)
}

func pauseUpTo(d time.Duration) { time.Sleep(rand.N(max(d, 1))) }

// client is somebody in the chat.
type client struct {
	s          *soak
	t          transport
	opened, id string // its Engine.IO and its Socket.IO id
	admin      bool
	rooms      map[int]*membership // that it is or was in, or heard of as an admin
}

type membership struct {
	in   bool
	next int // the number that the room's next message has to have; -1: it has heard none yet
}

// newClient does the handshake. With an error the client is nil, or still to be closed.
func (s *soak) newClient(polls bool) (*client, error) {
	c := &client{s: s, rooms: make(map[int]*membership)}
	if polls { // each by way of its own variable: a nil *polling in an interface is not nil
		t, err := s.openPolling()
		if err != nil {
			return nil, err
		}
		c.t = t
	} else {
		t, err := s.openWebSocket("")
		if err != nil {
			return nil, err
		}
		c.t = t
	}
	return c, c.expect("0{")
}

func (c *client) check(err error) {
	if err != nil {
		c.s.fault(err)
	}
}

// connect joins the namespace.
func (c *client) connect() error {
	if err := c.t.send("40"); err != nil {
		return err
	}
	return c.expect(`40{"sid":"`)
}

// stay connects, joins, listens, and changes rooms now and then.
func (c *client) stay(upgrade bool) error {
	if err := c.connect(); err != nil {
		return err
	}
	if rand.IntN(200) == 0 {
		c.admin = true
		if err := c.ask("join-admin", map[string]any{"auth": sign(c.id + ":admin-chat")}, `42["joined-admin"`); err != nil {
			return err
		}
	}
	for range 1 + rand.IntN(3) {
		if err := c.join(rand.IntN(c.s.rooms + 1)); err != nil {
			return err
		}
	}
	if upgrade {
		if err := c.upgrade(); err != nil {
			return fmt.Errorf("upgrade: %w", err)
		}
	}
	end := time.Now().Add(time.Duration(rand.ExpFloat64() * float64(*life)))
	if end.After(c.s.end) {
		end = c.s.end
	}
	for {
		change := time.Now().Add(time.Second + rand.N(*life))
		if change.After(end) {
			change = end
		}
		if err := c.listen(change); err != nil {
			return err
		}
		if change == end {
			return nil
		}
		if err := c.leaveOne(); err != nil {
			return err
		}
		if err := c.join(rand.IntN(c.s.rooms + 1)); err != nil {
			return err
		}
	}
}

func (c *client) join(room int) error {
	if m := c.rooms[room]; m == nil || !m.in && !c.admin {
		c.rooms[room] = &membership{next: -1}
	}
	c.rooms[room].in = true // its messages may come before the answer
	return c.ask("join-session", c.membership(room),
		fmt.Sprintf(`42["joined-session",{"sessionId":%d,"roomName":"session-%d"}]`, room, room),
		fmt.Sprintf(`42["joined-session",{"roomName":"session-%d","sessionId":%d}]`, room, room))
}

// membership is join-session's argument.
func (c *client) membership(room int) any {
	return map[string]any{"sessionId": room, "userType": "guest", "auth": sign(fmt.Sprintf("%s:chat-session.%d", c.id, room))}
}

// leaveOne leaves any of its rooms, after which it may hear nothing of it.
func (c *client) leaveOne() error {
	for room, m := range c.rooms {
		if m.in {
			err := c.ask("leave-session", map[string]any{"sessionId": room}, `42["left-session"`)
			m.in = false
			return err
		}
	}
	return nil
}

// ask emits an event and waits for one of the answers.
func (c *client) ask(event string, argument any, answers ...string) error {
	if err := c.emit(event, argument); err != nil {
		return err
	}
	return c.expect(answers...)
}

func (c *client) emit(event string, argument any) error {
	packet, _ := json.Marshal([]any{event, argument})
	return c.t.send("42" + string(packet))
}

// expect handles packets until one begins with one of the prefixes.
func (c *client) expect(prefixes ...string) error {
	deadline := time.Now().Add(patience)
	for {
		packets, err := c.t.receive(deadline)
		if err != nil {
			return fmt.Errorf("waiting for %s: %w", prefixes[0][:min(len(prefixes[0]), 12)], err)
		}
		found := false
		for _, packet := range packets {
			for _, prefix := range prefixes {
				found = found || strings.HasPrefix(packet, prefix)
			}
			if err := c.handle(packet); err != nil {
				return err
			}
		}
		if found {
			return nil
		}
	}
}

// listen handles packets until the time has come.
func (c *client) listen(until time.Time) error {
	for {
		packets, err := c.t.receive(until)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, packet := range packets {
			if err := c.handle(packet); err != nil {
				return err
			}
		}
	}
}

const messagePrefix = `42["message.sent",`

func (c *client) handle(packet string) error {
	switch {
	case strings.HasPrefix(packet, messagePrefix):
		var message struct {
			Room, N int
			At      int64
		}
		if err := json.Unmarshal([]byte(packet[len(messagePrefix):len(packet)-1]), &message); err != nil {
			return fmt.Errorf("message: %w", err)
		}
		c.s.took(time.Since(time.UnixMicro(message.At)))
		return c.hear(message.Room, message.N)
	case packet == "2":
		return c.t.send("3")
	case packet == "6", strings.HasPrefix(packet, `42["joined-`), strings.HasPrefix(packet, `42["left-`):
		return nil
	case strings.HasPrefix(packet, "0"), strings.HasPrefix(packet, "40"):
		var opened struct{ Sid string }
		if err := json.Unmarshal([]byte(strings.TrimLeft(packet, "04")), &opened); err != nil {
			return fmt.Errorf("%.20q: %w", packet, err)
		}
		c.opened, c.id = c.id, opened.Sid // first the one, then the other
		if c.opened == "" {
			c.opened = c.id
		}
		return nil
	default:
		return fmt.Errorf("unexpected packet %.60q", packet)
	}
}

// hear checks that a message is for this client, and the one that follows the last it heard.
func (c *client) hear(room, n int) error {
	c.s.read.Add(1)
	m := c.rooms[room]
	if m == nil {
		m = &membership{next: -1}
		c.rooms[room] = m
	}
	if !m.in && !c.admin {
		return errors.New("it heard a room that it is not in")
	}
	if m.next >= 0 && n != m.next {
		return fmt.Errorf("a message came %d too early or late", n-m.next)
	}
	m.next = n + 1
	return nil
}

// upgrade moves from polling to a WebSocket as socket.io-client does: probe, wait for the poll, switch.
func (c *client) upgrade() error {
	ws, err := c.s.openWebSocket(c.opened)
	if err != nil {
		return err
	}
	polls := c.t.(*polling)
	if err := polls.poll(); err != nil { // one is always under way
		return err
	}
	if err := ws.send("2probe"); err != nil {
		return err
	}
	packets, err := ws.receive(time.Now().Add(patience))
	if err != nil || len(packets) != 1 || packets[0] != "3probe" {
		return fmt.Errorf("probe answered %q: %w", packets, err)
	}
	packets, err = polls.receive(time.Now().Add(patience))
	if err != nil {
		return fmt.Errorf("the last poll: %w", err)
	}
	for _, packet := range packets {
		if err := c.handle(packet); err != nil {
			return err
		}
	}
	if err := ws.send("5"); err != nil {
		return err
	}
	polls.leave(false)
	c.t = ws
	return nil
}

// transport carries Engine.IO packets.
type transport interface {
	send(packet string) error
	receive(deadline time.Time) ([]string, error) // os.ErrDeadlineExceeded: none came, go on
	goodbye() error                               // closes, as the client's disconnect() does
	leave(reset bool)                             // closes the TCP connection alone
	vanish(s *soak)
}

type webSocket struct{ c *conn }

// openWebSocket connects; with an Engine.IO id, to upgrade its session.
func (s *soak) openWebSocket(sid string) (*webSocket, error) {
	c, err := s.dial()
	if err != nil {
		return nil, err
	}
	path := "/socket.io/?EIO=4&transport=websocket"
	if sid != "" {
		path += "&sid=" + sid
	}
	c.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: %s\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n", path, *addr)
	response, err := http.ReadResponse(c.r, nil)
	if err == nil && response.StatusCode != http.StatusSwitchingProtocols {
		err = errors.New(response.Status)
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("handshake: %w", err)
	}
	return &webSocket{c}, nil
}

func (t *webSocket) send(packet string) error { return t.frame(1, packet) }

// frame writes a masked frame; a mask of zeros leaves the payload as it is.
func (t *webSocket) frame(opcode byte, payload string) error {
	b := []byte{0x80 | opcode, 0x80 | byte(len(payload))}
	if len(payload) > 125 {
		b = []byte{0x80 | opcode, 0x80 | 126, byte(len(payload) >> 8), byte(len(payload))}
	}
	b = append(append(b, 0, 0, 0, 0), payload...)
	t.c.SetWriteDeadline(time.Now().Add(patience))
	_, err := t.c.Write(b)
	return err
}

// receive takes a frame off the buffer once all of it is there, so that a deadline leaves nothing half read.
func (t *webSocket) receive(deadline time.Time) ([]string, error) {
	t.c.SetReadDeadline(deadline)
	head, err := t.c.r.Peek(2)
	if err != nil {
		return nil, err
	}
	opcode, size, skip := head[0]&15, int(head[1]), 2
	if size == 126 {
		if head, err = t.c.r.Peek(4); err != nil {
			return nil, err
		}
		size, skip = int(head[2])<<8|int(head[3]), 4
	}
	frame, err := t.c.r.Peek(skip + size)
	if err != nil {
		return nil, err
	}
	packet := string(frame[skip:])
	t.c.r.Discard(skip + size)
	if opcode != 1 {
		return nil, fmt.Errorf("frame of opcode %d: %q", opcode, packet)
	}
	return []string{packet}, nil
}

func (t *webSocket) goodbye() error {
	defer t.c.Close()
	if err := t.send("41"); err != nil {
		return err
	}
	if err := t.frame(8, "\x03\xe8"); err != nil { // 1000: normal closure
		return err
	}
	t.c.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.Copy(io.Discard, t.c.r); err != nil {
		return fmt.Errorf("goodbye: %w", err)
	}
	return nil
}

func (t *webSocket) leave(reset bool) { t.c.end(reset) }

func (t *webSocket) vanish(s *soak) { s.vanish(t.c) }

// polling has a connection for polls and one for what it sends, as browsers have.
type polling struct {
	polls, posts *conn
	path         string
	pending      bool // a poll has been sent
}

func (s *soak) openPolling() (*polling, error) {
	polls, err := s.dial()
	if err != nil {
		return nil, err
	}
	posts, err := s.dial()
	if err != nil {
		polls.Close()
		return nil, err
	}
	return &polling{polls: polls, posts: posts, path: "/socket.io/?EIO=4&transport=polling"}, nil
}

func (t *polling) send(packet string) error {
	answer, err := t.posts.request("POST", t.path, packet, time.Now().Add(patience))
	if err == nil && string(answer) != "ok" {
		err = fmt.Errorf("answered %.60q", answer)
	}
	if err != nil {
		return fmt.Errorf("post: %w", err)
	}
	return nil
}

// poll sends a poll, unless one is under way.
func (t *polling) poll() error {
	if t.pending {
		return nil
	}
	t.pending = true
	return t.polls.write("GET", t.path, "")
}

func (t *polling) receive(deadline time.Time) ([]string, error) {
	if err := t.poll(); err != nil {
		return nil, err
	}
	t.polls.SetReadDeadline(deadline)
	if _, err := t.polls.r.Peek(1); err != nil {
		return nil, err
	}
	body, err := t.polls.answer(time.Now().Add(patience))
	if err != nil {
		return nil, fmt.Errorf("poll: %w", err)
	}
	t.pending = false
	packets := strings.Split(string(body), "\x1e")
	if strings.HasPrefix(packets[0], "0{") {
		var opened struct{ Sid string }
		if err := json.Unmarshal(body[1:], &opened); err != nil {
			return nil, err
		}
		t.path += "&sid=" + opened.Sid
	}
	return packets, nil
}

func (t *polling) goodbye() error {
	defer t.leave(false)
	if err := t.send("41\x1e1"); err != nil {
		return fmt.Errorf("goodbye: %w", err)
	}
	if t.pending { // answered by 400 if it came behind the goodbye, on its connection of its own
		t.polls.SetReadDeadline(time.Now().Add(patience))
		if _, err := http.ReadResponse(t.polls.r, nil); err != nil {
			return fmt.Errorf("the poll that waits at goodbye: %w", err)
		}
	}
	return nil
}

func (t *polling) leave(reset bool) {
	t.polls.end(reset)
	t.posts.end(reset)
}

// vanish leaves no connection open: an idle one is kept for the next request, and that is right.
func (t *polling) vanish(*soak) { t.leave(rand.IntN(2) == 0) }

// conn is an HTTP connection.
type conn struct {
	net.Conn // tcp, or TLS over it
	tcp      *net.TCPConn
	r        *bufio.Reader
}

// dialTCP comes from any of some addresses, so that no pair of addresses runs out of ports.
func dialTCP(to, from string, addresses int) (*conn, error) {
	ip := net.ParseIP(from).To4()
	ip[3] += byte(rand.IntN(addresses))
	d := net.Dialer{Timeout: patience, LocalAddr: &net.TCPAddr{IP: ip}}
	c, err := d.Dial("tcp", to)
	if err != nil {
		return nil, err
	}
	return &conn{c, c.(*net.TCPConn), bufio.NewReader(c)}, nil
}

// dialDaemon is for /broadcast and /health.
func dialDaemon() (*conn, error) { return dialTCP(*addr, "127.0.0.1", 20) }

// dial is for clients.
func (s *soak) dial() (*conn, error) {
	c, err := dialTCP(s.to, s.from, s.addresses)
	if err != nil || s.tls == nil {
		return c, err
	}
	over := tls.Client(c.tcp, s.tls)
	c.SetDeadline(time.Now().Add(patience))
	if err := over.Handshake(); err != nil {
		c.Close()
		return nil, err
	}
	c.SetDeadline(time.Time{})
	return &conn{over, c.tcp, bufio.NewReader(over)}, nil
}

func (c *conn) write(method, path, body string) error {
	header := ""
	if *secret != "" {
		header = "Authorization: Bearer " + *secret + "\r\n"
	}
	if body != "" {
		header += "Content-Type: text/plain;charset=UTF-8\r\nContent-Length: " + strconv.Itoa(len(body)) + "\r\n"
	}
	c.SetWriteDeadline(time.Now().Add(patience))
	_, err := fmt.Fprintf(c, "%s %s HTTP/1.1\r\nHost: %s\r\n%s\r\n%s", method, path, *addr, header, body)
	return err
}

func (c *conn) answer(deadline time.Time) ([]byte, error) {
	c.SetReadDeadline(deadline)
	response, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return nil, err
	}
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %.100q", response.Status, body)
	}
	return body, err
}

func (c *conn) request(method, path, body string, deadline time.Time) ([]byte, error) {
	if err := c.write(method, path, body); err != nil {
		return nil, err
	}
	return c.answer(deadline)
}

func (c *conn) end(reset bool) {
	if reset {
		c.tcp.SetLinger(0) // RST
	}
	c.Close()
}
