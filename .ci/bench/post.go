package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// publisher posts as a PHP process does. kept, it keeps its connection: else each post opens one, as Laravel's do under
// PHP-FPM, and closes it when the answer is there.
type publisher struct {
	server *server
	number int
	kept   bool
	conn   net.Conn
	r      *bufio.Reader
}

var padding = strings.Repeat("x", 170) // a message has some 200 characters

func (p *publisher) post(room string, id int, due time.Time) error {
	if p.conn == nil {
		from := net.TCPAddr{IP: net.IPv4(127, 0, 2, byte(1+p.number))}
		conn, err := (&net.Dialer{Timeout: patience, LocalAddr: &from}).Dial("tcp", p.server.addr)
		if err != nil {
			return err
		}
		p.conn, p.r = conn, bufio.NewReader(conn)
	}
	_ = p.conn.SetDeadline(time.Now().Add(patience))
	text := message(id, due) + padding
	path, header, body := p.server.post(room, text)
	request := fmt.Appendf(nil, "POST %s HTTP/1.1\r\nHost: %s\r\n%sContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		path, p.server.addr, header, len(body), body)
	if _, err := p.conn.Write(request); err != nil {
		return err
	}
	answer, err := http.ReadResponse(p.r, nil)
	if err != nil {
		return err
	}
	said, err := io.ReadAll(answer.Body)
	switch {
	case err != nil:
		return err
	case answer.StatusCode/100 != 2 || bytes.Contains(said, []byte(`"error"`)):
		return fmt.Errorf("%s: %.200s", answer.Status, said)
	}
	if !p.kept || answer.Close { // Reverb closes it always
		p.close()
	}
	return nil
}

func (p *publisher) close() {
	if p.conn != nil {
		p.conn.Close()
		p.conn = nil
	}
}
