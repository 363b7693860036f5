<!doctype html>
<meta charset="utf-8">
<div id="app" data-session-id="{{ $chat->id }}"></div>
<script type="module" src="/build/chat.js"></script>
