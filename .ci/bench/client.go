package main

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// client is one WebSocket. net's connection has it until it is in its room, and the reader's epoll after that: one thread
// reads them all, so that the load takes little of the cores that it shares with the server.
type client struct {
	server *server
	number int
	room   int

	net  net.Conn
	r    *bufio.Reader
	fd   int
	rest []byte // the begin of a frame whose end has yet to come
	got  []uint32
	gone bool // the server has closed it
}

const (
	opText, opClose, opPing, opPong = 1, 8, 9, 10
	patience                        = 20 * time.Second // for anything that is waited for
)

// dial opens a WebSocket and speaks until it is in its room.
func dial(s *server, number, room int) (*client, error) {
	// Each address has 28,000 ports, and one that was used a moment ago is not always to be had.
	from := net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(1+number%200))}
	conn, err := (&net.Dialer{Timeout: patience, LocalAddr: &from}).Dial("tcp", s.addr)
	if err != nil {
		return nil, err
	}
	c := &client{server: s, number: number, room: room, net: conn, r: bufio.NewReaderSize(conn, 1024)}
	if err := c.enter(); err != nil {
		conn.Close()
		return nil, fmt.Errorf("client %d: %w", number, err)
	}
	return c, nil
}

func (c *client) enter() error {
	_ = c.net.SetDeadline(time.Now().Add(patience))
	key := make([]byte, 16)
	_, _ = rand.Read(key)
	path, header := c.server.open(c)
	fmt.Fprintf(c.net, "GET %s HTTP/1.1\r\nHost: %s\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n%sSec-WebSocket-Key: %s\r\n\r\n",
		path, c.server.addr, header, base64.StdEncoding.EncodeToString(key))
	answer, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	if answer.StatusCode != http.StatusSwitchingProtocols {
		return fmt.Errorf("handshake: %s", answer.Status)
	}
	if err := c.server.join(c, roomName(c.room)); err != nil {
		return fmt.Errorf("join: %w", err)
	}
	return c.net.SetDeadline(time.Time{})
}

func roomName(room int) string { return "r" + strconv.Itoa(room) }

// say sends a text before the reader has the client.
func (c *client) say(text string) error {
	_, err := c.net.Write(masked(opText, []byte(text)))
	return err
}

// hear waits for a text that begins with one of the prefixes.
func (c *client) hear(prefixes ...string) ([]byte, error) {
	for {
		opcode, payload, err := readFrame(c.r)
		if err != nil {
			return nil, err
		}
		if pong := c.server.pong(opcode, payload); pong != nil {
			if _, err := c.net.Write(pong); err != nil {
				return nil, err
			}
			continue
		}
		for _, prefix := range prefixes {
			if bytes.HasPrefix(payload, []byte(prefix)) {
				return payload, nil
			}
		}
		return nil, fmt.Errorf("got %.200q in place of %q", payload, prefixes)
	}
}

func readFrame(r *bufio.Reader) (opcode byte, payload []byte, err error) {
	var head [10]byte
	if _, err := io.ReadFull(r, head[:2]); err != nil {
		return 0, nil, err
	}
	more := map[byte]int{126: 2, 127: 8}[head[1]]
	if _, err := io.ReadFull(r, head[2:2+more]); err != nil {
		return 0, nil, err
	}
	opcode, _, size, _ := frameHead(head[:2+more])
	payload = make([]byte, size)
	_, err = io.ReadFull(r, payload)
	return opcode, payload, err
}

// frameHead reads a frame's header, if it is whole. A server's frames are not masked.
func frameHead(b []byte) (opcode byte, start, size int, whole bool) {
	if len(b) < 2 {
		return 0, 0, 0, false
	}
	opcode, size, start = b[0]&15, int(b[1]), 2
	switch {
	case size == 126 && len(b) >= 4:
		return opcode, 4, int(binary.BigEndian.Uint16(b[2:])), true
	case size == 127 && len(b) >= 10:
		return opcode, 10, int(binary.BigEndian.Uint64(b[2:])), true
	}
	return opcode, start, size, size < 126
}

// masked returns a client's frame, with a mask of zeros.
func masked(opcode byte, payload []byte) []byte {
	frame := []byte{0x80 | opcode, 0x80 | byte(len(payload))}
	if len(payload) > 125 {
		frame = binary.BigEndian.AppendUint16([]byte{0x80 | opcode, 0x80 | 126}, uint16(len(payload)))
	}
	return append(append(frame, 0, 0, 0, 0), payload...)
}

// reader reads all clients' messages.
type reader struct {
	epoll  int
	ending [2]int // a pipe: closed at its end, it ends the loop
	ended  chan struct{}

	mu        sync.Mutex // guards all that follows, and what the clients got
	clients   map[int32]*client
	delivered int
	want      int           // deliveries that somebody waits for
	there     chan struct{} // closed when they are there
	timed     bool
	times     []time.Duration // from when the post was due to the client, while timed
	lost      chan *client    // nil: a client that the server closes is a fault
	gone      int
}

func newReader() (*reader, error) {
	r := &reader{clients: make(map[int32]*client), ended: make(chan struct{})}
	var err error
	if r.epoll, err = syscall.EpollCreate1(syscall.EPOLL_CLOEXEC); err != nil {
		return nil, err
	}
	if err := syscall.Pipe2(r.ending[:], syscall.O_CLOEXEC); err != nil {
		return nil, err
	}
	if err := r.watch(r.ending[0]); err != nil {
		return nil, err
	}
	go r.run()
	return r, nil
}

func (r *reader) watch(fd int) error {
	return syscall.EpollCtl(r.epoll, syscall.EPOLL_CTL_ADD, fd, &syscall.EpollEvent{Events: syscall.EPOLLIN, Fd: int32(fd)})
}

// add takes a client over, with what has come for it already.
func (r *reader) add(c *client) error {
	raw, err := c.net.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err
	}
	var failed syscall.Errno
	err = raw.Control(func(fd uintptr) {
		var own uintptr
		own, _, failed = syscall.Syscall(syscall.SYS_FCNTL, fd, syscall.F_DUPFD_CLOEXEC, 0)
		c.fd = int(own)
	})
	if err != nil || failed != 0 {
		return cmp.Or(err, error(failed))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	early, _ := c.r.Peek(c.r.Buffered())
	r.take(c, slices.Clone(early))
	c.net.Close()
	c.net, c.r = nil, nil
	r.clients[int32(c.fd)] = c
	return r.watch(c.fd)
}

func (r *reader) run() {
	defer close(r.ended)
	events := make([]syscall.EpollEvent, 256)
	buffer := make([]byte, 256<<10)
	for {
		n, err := syscall.EpollWait(r.epoll, events, -1)
		if err == syscall.EINTR {
			continue
		}
		r.mu.Lock()
		for _, event := range events[:max(n, 0)] {
			if int(event.Fd) == r.ending[0] {
				r.mu.Unlock()
				return
			}
			r.read(r.clients[event.Fd], buffer)
		}
		r.mu.Unlock()
	}
}

// read reads once. What the socket still has comes with the next event.
func (r *reader) read(c *client, buffer []byte) {
	kept := copy(buffer, c.rest)
	n, err := syscall.Read(c.fd, buffer[kept:])
	if err == syscall.EAGAIN || err == syscall.EINTR {
		return
	}
	if n <= 0 {
		r.remove(c)
		return
	}
	r.take(c, buffer[:kept+n])
}

// take takes all whole frames, and keeps the rest.
func (r *reader) take(c *client, b []byte) {
	for len(b) > 0 {
		opcode, start, size, whole := frameHead(b)
		if !whole || len(b) < start+size {
			break
		}
		r.frame(c, opcode, b[start:start+size])
		b = b[start+size:]
	}
	c.rest = append(c.rest[:0], b...)
}

func (r *reader) frame(c *client, opcode byte, payload []byte) {
	if pong := c.server.pong(opcode, payload); pong != nil {
		_, _ = syscall.Write(c.fd, pong)
		return
	}
	for { // one frame may hold several messages
		i := bytes.Index(payload, mark)
		if i < 0 {
			return
		}
		payload = payload[i+len(mark):]
		id, rest := number(payload)
		at, rest := number(rest[1:])
		payload = rest
		c.got = append(c.got, uint32(id))
		r.delivered++
		if r.timed {
			r.times = append(r.times, time.Since(began)-time.Duration(at))
		}
		if r.delivered == r.want {
			close(r.there)
		}
	}
}

// mark stands before a message's number and time, in a form that no server escapes.
var (
	mark  = []byte("~bench.")
	began = time.Now()
)

func message(id int, due time.Time) string { return fmt.Sprintf("%s%d.%d~", mark, id, due.Sub(began)) }

func number(b []byte) (n int, rest []byte) {
	i := 0
	for i < len(b) && b[i] >= '0' && b[i] <= '9' {
		n = n*10 + int(b[i]-'0')
		i++
	}
	return n, b[i:]
}

// remove is for a client that the server has closed.
func (r *reader) remove(c *client) {
	r.forget(c)
	c.gone = true
	r.gone++
	if r.lost != nil {
		r.lost <- c
	}
}

func (r *reader) forget(c *client) {
	delete(r.clients, int32(c.fd))
	// close(2) alone leaves it in the epoll while a server that is being started has a copy.
	_ = syscall.EpollCtl(r.epoll, syscall.EPOLL_CTL_DEL, c.fd, nil)
	syscall.Close(c.fd)
}

// begin starts a new count, of what comes from now on. timed keeps how long each delivery takes.
func (r *reader) begin(timed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.delivered, r.want, r.timed, r.times = 0, -1, timed, nil
}

var errLoss = errors.New("not all messages came")

// wait waits until so many messages have come.
func (r *reader) wait(deliveries int) error {
	r.mu.Lock()
	there := make(chan struct{})
	r.want, r.there = deliveries, there
	if r.delivered >= deliveries {
		close(there)
		r.want = -1
	}
	r.mu.Unlock()
	select {
	case <-there:
		return nil
	case <-time.After(patience):
		return errLoss
	}
}

func (r *reader) close() {
	syscall.Close(r.ending[1])
	<-r.ended
	for _, c := range r.clients {
		r.forget(c)
	}
	syscall.Close(r.ending[0])
	syscall.Close(r.epoll)
}
