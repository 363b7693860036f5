package main

import (
	"bufio"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

// streams is an HTTP/2 connection (RFC 9113), as far as it takes one to park polls on it, or to leave their answers unread:
// net/http's would read them, and open another connection where one is full. nginx lets 128 requests at once be on one.
type streams struct {
	*conn
	last uint32 // stream that was opened
}

const (
	perConnection = 120 // sessions: with what else is asked, below nginx's 128 at once and its 1,000 in all
	frameData     = 0
	frameHeaders  = 1
	frameReset    = 3
	frameSettings = 4
	framePing     = 6
	frameGoAway   = 7
	frameWindow   = 8
	flagEnd       = 1 // END_STREAM, and ACK
	flagHeaders   = 4 // END_HEADERS
	windowSetting = 4 // SETTINGS_INITIAL_WINDOW_SIZE: bytes of a stream that may be sent to us
)

func (s *soak) openStreams() (*streams, error) {
	c, err := dialTCP(s.to, s.from, s.addresses)
	if err != nil {
		return nil, err
	}
	config := s.tls.Clone()
	config.NextProtos = []string{"h2"}
	over := tls.Client(c.tcp, config)
	c.SetDeadline(time.Now().Add(patience))
	if err := over.Handshake(); err != nil {
		c.Close()
		return nil, err
	}
	h := &streams{&conn{over, c.tcp, bufio.NewReader(over)}, 1}
	if over.ConnectionState().NegotiatedProtocol != "h2" {
		c.Close()
		return nil, errors.New("nginx has no HTTP/2 here")
	}
	_, err = io.WriteString(h, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	return h, errors.Join(err, h.frame(frameSettings, 0, 0, nil))
}

func (h *streams) frame(kind, flags byte, stream uint32, payload []byte) error {
	head := binary.BigEndian.AppendUint32(nil, uint32(len(payload))<<8|uint32(kind))
	head = append(head, flags)
	h.SetWriteDeadline(time.Now().Add(patience))
	_, err := h.Write(append(binary.BigEndian.AppendUint32(head, stream), payload...))
	return err
}

// ask opens a stream with a request. Its header is written out in full (RFC 7541, 6.2.2), each length in one byte.
func (h *streams) ask(method, path, body string) error {
	h.last += 2
	var header []byte
	for _, field := range [][2]string{{":method", method}, {":scheme", "https"}, {":path", path}, {":authority", *domain}, {"content-type", "text/plain;charset=UTF-8"}} {
		header = append(append(header, 0, byte(len(field[0]))), field[0]...)
		header = append(append(header, byte(len(field[1]))), field[1]...)
	}
	if body == "" {
		return h.frame(frameHeaders, flagHeaders|flagEnd, h.last, header)
	}
	return errors.Join(h.frame(frameHeaders, flagHeaders, h.last, header), h.frame(frameData, flagEnd, h.last, []byte(body)))
}

// next reads a frame. It gives back what data took of the connection's window, and answers what has to be answered.
func (h *streams) next(deadline time.Time) (kind, flags byte, stream uint32, payload []byte, err error) {
	var head [9]byte
	h.SetReadDeadline(deadline)
	if _, err = io.ReadFull(h.r, head[:]); err != nil {
		return
	}
	kind, flags, stream = head[3], head[4], binary.BigEndian.Uint32(head[5:])
	payload = make([]byte, binary.BigEndian.Uint32(head[:])>>8)
	if _, err = io.ReadFull(h.r, payload); err != nil {
		return
	}
	switch {
	case kind == frameData && len(payload) > 0:
		err = h.frame(frameWindow, 0, 0, binary.BigEndian.AppendUint32(nil, uint32(len(payload))))
	case kind == frameGoAway:
		err = fmt.Errorf("nginx says goodbye: %x", payload)
	case (kind == frameSettings || kind == framePing) && flags&flagEnd == 0:
		if kind == frameSettings {
			payload = nil
		}
		err = h.frame(kind, flagEnd, 0, payload)
	}
	return
}

// request asks, and waits for the answer's body.
func (h *streams) request(method, path, body string) (string, error) {
	if err := h.ask(method, path, body); err != nil {
		return "", err
	}
	var answer strings.Builder
	for {
		kind, flags, stream, payload, err := h.next(time.Now().Add(patience))
		if err != nil || stream == h.last && kind == frameReset {
			return "", errors.Join(err, errors.New("refused"))
		}
		if stream == h.last && kind == frameData {
			answer.Write(payload)
		}
		if stream == h.last && kind <= frameHeaders && flags&flagEnd != 0 {
			return answer.String(), nil
		}
	}
}

// sessions connects perConnection of them on one connection, each in the busy room, and returns their paths.
func (s *soak) sessions() (*streams, []string, error) {
	h, err := s.openStreams()
	if err != nil {
		return nil, nil, err
	}
	var paths []string
	for range perConnection {
		const path = "/socket.io/?EIO=4&transport=polling"
		opened, err := h.request("GET", path, "")
		_, sid, _ := strings.Cut(opened, `"sid":"`)
		sid, _, found := strings.Cut(sid, `"`)
		if err == nil && !found {
			err = fmt.Errorf("no session: %.60q", opened)
		}
		session := path + "&sid=" + sid
		var connected string
		if err == nil {
			_, err = h.request("POST", session, "40")
		}
		if err == nil {
			connected, err = h.request("GET", session, "")
		}
		_, id, _ := strings.Cut(connected, `40{"sid":"`)
		id, _, found = strings.Cut(id, `"`)
		if err == nil && !found {
			err = fmt.Errorf("not connected: %.60q", connected)
		}
		if err == nil {
			_, err = h.request("POST", session, fmt.Sprintf(`42["join-session",{"sessionId":%d,"auth":"%s"}]`, s.rooms, sign(fmt.Sprintf("%s:chat-session.%d", id, s.rooms))))
		}
		if err != nil {
			h.Close()
			return nil, nil, err
		}
		paths = append(paths, session)
	}
	return h, paths, nil
}

// parkStreams polls with all sessions of one connection at once, and reads what comes.
func (s *soak) parkStreams() (bool, error) { return s.pollStreams(false) }

// unreadStreams polls so, and lets no byte of an answer come: each waits in nginx and in the daemon.
func (s *soak) unreadStreams() (bool, error) { return s.pollStreams(true) }

func (s *soak) pollStreams(unread bool) (bool, error) {
	h, paths, err := s.sessions()
	if err != nil {
		return false, err
	}
	defer h.Close()
	if unread {
		err = h.frame(frameSettings, 0, 0, []byte{0, windowSetting, 0, 0, 0, 0})
	}
	for _, path := range paths {
		err = errors.Join(err, h.ask("GET", path, ""))
	}
	if err != nil {
		return false, err
	}
	polls, ended := h.last, 0
	for {
		kind, flags, stream, _, err := h.next(s.end)
		if err != nil || ended == len(paths) {
			return time.Now().Before(s.end), nil
		}
		if ours := stream > polls-2*uint32(len(paths)); ours && (kind == frameReset || kind <= frameHeaders && flags&flagEnd != 0) {
			ended++
		}
	}
}
