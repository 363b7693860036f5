package main

import (
	"strings"
	"testing"
)

// TestCheck has a room of three hear what they should, and then not.
func TestCheck(t *testing.T) {
	posted := sent{{0, 2, 4}, {1, 3}} // by two publishers
	order := []uint32{0, 1, 2, 3, 4}
	for _, c := range []struct {
		name  string
		third []uint32 // what the third client got; the others got order
		gone  int
		want  string
	}{
		{"all", order, 0, ""},
		{"a loss", []uint32{0, 1, 2, 4}, 0, "1 lost, 0 twice, 0 foreign, 0 clients with another order"},
		{"a loss at the end", []uint32{0, 1, 2, 3}, 0, "1 lost, 0 twice"},
		{"a double", []uint32{0, 1, 2, 2, 3, 4}, 0, "0 lost, 1 twice"},
		{"a double in place of another", []uint32{0, 1, 2, 2, 4}, 0, "1 lost, 1 twice"},
		{"another room's", []uint32{0, 1, 9, 2, 3, 4}, 0, "0 lost, 0 twice, 1 foreign"},
		{"another order", []uint32{0, 2, 1, 3, 4}, 0, "0 lost, 0 twice, 0 foreign, 1 clients with another order"},
		{"a publisher's messages the wrong way round", []uint32{2, 1, 0, 3, 4}, 0, "1 clients with another order"},
		{"nothing", nil, 0, "5 lost"},
		{"a cut-off", order, 1, "1 clients cut off"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := &load{reader: &reader{gone: c.gone}, rooms: [][]*client{{{got: order}, {got: order}, {got: c.third}}}}
			err := l.check(posted)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	t.Run("a publisher's messages the wrong way round, for all", func(t *testing.T) {
		wrong := []uint32{2, 1, 0, 3, 4}
		l := &load{reader: &reader{}, rooms: [][]*client{{{got: wrong}, {got: wrong}}}}
		if err := l.check(posted); err == nil || !strings.Contains(err.Error(), "2 clients with another order") {
			t.Errorf("got %v", err)
		}
	})
}

// TestLate has a double of one phase come after that phase was checked.
func TestLate(t *testing.T) {
	c := &client{got: []uint32{0}}
	l := &load{reader: &reader{}, rooms: [][]*client{{c}}}
	if err := l.check(sent{{0}}); err != nil {
		t.Fatal(err)
	}
	c.got = append(c.got, 0)
	l.begin(false)
	c.got = append(c.got, 1)
	if err := l.check(sent{{1}}); err == nil || !strings.Contains(err.Error(), "1 foreign") {
		t.Errorf("got %v", err)
	}
}

// TestFrames reads a server's frames as they come: in pieces, several at once, several messages in one.
func TestFrames(t *testing.T) {
	text := `42["message.sent",{"text":"` + message(7, began) + padding + `"}]`
	frame := append([]byte{0x81, 126, byte(len(text) >> 8), byte(len(text))}, text...)
	lines := message(8, began) + "\n" + message(9, began)
	stream := append(frame, append([]byte{0x81, byte(len(lines))}, lines...)...)
	c := &client{server: &server{speaks: socketIO{}}}
	r := &reader{want: -1}
	for i := range stream {
		r.take(c, append(c.rest, stream[i]))
	}
	if len(c.got) != 3 || c.got[0] != 7 || c.got[1] != 8 || c.got[2] != 9 || len(c.rest) > 0 {
		t.Errorf("got %v, and %q is left", c.got, c.rest)
	}
}
