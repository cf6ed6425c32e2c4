// The words of the app in English and Korean. How times, errors and entries of natter become sentences is shared with the
// operators' page.

import { lang, t as shared } from "./operate-words.js";

export { button, clock, day, element, full, lang, names, sentence, textOf, titleOf, told } from "./operate-words.js";

const WORDS = {
  token: ["Token", "토큰"],
  tokenFrom: ["from natter up, or natter token", "natter up 또는 natter token에서"],
  room: ["Room (optional)", "대화방 (선택)"],
  enter: ["Enter", "들어가기"],
  leave: ["Log out", "로그아웃"],
  rooms: ["Rooms", "대화방"],
  findRoom: ["Find a room", "대화방 찾기"],
  back: ["Rooms", "대화방"],
  noRooms: ["You are in no room yet.", "아직 참여한 대화방이 없습니다."],
  noneFound: ["No room is called that.", "찾는 대화방이 없습니다."],
  moreRooms: ["More rooms", "대화방 더 보기"],
  choose: ["Choose a room.", "대화방을 선택하세요."],
  messages: ["Messages", "메시지"],
  message: ["Message", "메시지"],
  send: ["Send", "보내기"],
  answer: ["Answer", "답장"],
  react: ["Like", "좋아요"],
  edit: ["Edit", "수정"],
  delete: ["Delete", "삭제"],
  cancel: ["Cancel", "취소"],
  answering: ["Answer to {user}: {text}", "{user}님에게 답장: {text}"],
  editing: ["Edit: {text}", "수정: {text}"],
  reactions: ["{key}, {n}", "{key}, {n}개"],
  newRoom: ["New room", "새 대화방"],
  direct: ["Direct: these people, for good", "1:1 또는 정해진 사람들"],
  group: ["Group: members come and go", "그룹: 멤버가 바뀔 수 있음"],
  with: ["With (users, separated by commas)", "상대 (쉼표로 구분)"],
  title: ["Title", "제목"],
  namespace: ["Namespace", "네임스페이스"],
  make: ["Make the room", "만들기"],
  here: ["Here: {users}", "접속 중: {users}"],
  hereCount: ["{n} are here", "{n}명 접속 중"],
  latest: ["Newest messages", "최신 메시지"],
  latestNew: ["{n} new", "새 메시지 {n}개"],
  you: ["You", "나"],
  unread: ["{n} unread", "읽지 않음 {n}개"],
  mentioned: ["you were mentioned", "나를 언급함"],
  muted: ["muted", "알림 꺼짐"],
  newHere: ["New messages", "새 메시지"],
  sending: ["sending…", "보내는 중…"],
  waits: ["waits: {why}", "대기 중: {why}"],
  notSent: ["Not sent. {why}", "보내지 못했습니다. {why}"],
  again: ["Try again", "다시 시도"],
  discard: ["Discard", "버리기"],
  edited: ["edited", "수정됨"],
  deleted: ["This message was deleted.", "삭제된 메시지입니다."],
  answerTo: ["To {user}: {text}", "{user}님에게: {text}"],
  earlier: ["an earlier message", "이전 메시지"],
  oneFile: ["a file", "파일 1개"],
  files: ["{n} files", "파일 {n}개"],
  typing: ["{users}: typing…", "{users}: 입력 중…"],
  seen: ["Read by {users}", "읽음: {users}"],
  loading: ["Loading…", "불러오는 중…"],
  nothing: ["Nothing was said here yet.", "아직 메시지가 없습니다."],
  partial: ["Not everything can be shown just now.", "지금은 일부만 볼 수 있습니다."],
  out: ["You can't read this room. {why}", "이 대화방을 볼 수 없습니다. {why}"],
  idle: ["not connected", "연결 안 됨"],
  connecting: ["connecting…", "연결 중…"],
  online: ["connected", "연결됨"],
  offline: ["offline, trying again", "연결이 끊겨 다시 시도 중"],
  closed: ["closed: {reason}", "종료됨: {reason}"],
  badToken: ["This is not a token.", "토큰이 아닙니다."],
  otherUser: ["This link is for {user}, and this tab is {me}'s: “Enter” changes the user.", "이 링크는 {user}님의 것이고 이 탭은 {me}님의 것입니다. ‘들어가기’를 누르면 사용자가 바뀝니다."],
};

/** The words of `key`, with what stands in braces filled in. */
export function t(key, values = {}) {
  const words = WORDS[key];
  if (!words) return shared(key, values);
  return words[lang === "ko" ? 1 : 0].replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

/** Puts the words into a page: `data-say` is the text, `data-label` the name, `data-hint` the placeholder. */
export function translate(page) {
  page.documentElement.lang = lang;
  for (const node of page.querySelectorAll("[data-say]")) node.textContent = t(node.dataset.say);
  for (const node of page.querySelectorAll("[data-label]")) node.ariaLabel = t(node.dataset.label);
  for (const node of page.querySelectorAll("[data-hint]")) node.placeholder = t(node.dataset.hint);
}

/** Changes a text only where it is another one: a live region tells each change. */
export function set(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
