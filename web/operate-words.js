// The words of the operators' page, in English and Korean, and how times, errors and entries of natter become sentences.

const WORDS = {
  operate: ["operators", "상담"],
  leave: ["Log out", "로그아웃"],
  token: ["Token", "토큰"],
  tokenFrom: ["with the right “follow”", "follow 권한이 있는 토큰"],
  pattern: ["Rooms", "대화방"],
  patternForm: ["chat:* for a namespace, *:* for all", "네임스페이스는 chat:*, 전체는 *:*"],
  enter: ["Enter", "들어가기"],
  notConnected: ["not connected", "연결 안 됨"],
  connecting: ["connecting…", "연결 중…"],
  online: ["connected", "연결됨"],
  offline: ["offline, trying again", "연결이 끊겨 다시 시도 중"],
  closed: ["closed: {reason}", "종료됨: {reason}"],
  expiring: ["The token ends at {time}. Log out and enter a new one.", "토큰이 {time}에 만료됩니다. 로그아웃한 뒤 새 토큰을 입력하세요."],
  otherUser: ["This link is for {user}, and this tab is {me}'s: “Enter” changes the user.", "이 링크는 {user}님의 것이고 이 탭은 {me}님의 것입니다. ‘들어가기’를 누르면 사용자가 바뀝니다."],
  conversations: ["Conversations", "대화 목록"],
  conversation: ["Conversation", "대화"],
  messages: ["Messages", "메시지"],
  filters: ["Filters", "필터"],
  textFilter: ["Newest message contains…", "최근 메시지 내용 검색…"],
  alerts: ["Alerts", "알림"],
  alert: ["Alert", "알림"],
  unanswered: ["Unanswered", "미응답"],
  mine: ["Mine", "내 담당"],
  nobodys: ["Nobody's", "담당 없음"],
  mood: ["Annotation", "주석 조건"],
  fine: ["Settings of the filters", "필터 설정"],
  longer: ["Unanswered for", "미응답 시간"],
  ageForm: ["such as 30s, 5m or 2h", "예: 30s, 5m, 2h"],
  staff: ["Who answers (separated by commas)", "상담원 (쉼표로 구분)"],
  condition: ["Annotation that counts", "주석 조건"],
  badField: ["Look at the settings of the filters: {what}.", "필터 설정을 확인하세요: {what}."],
  counted: ["{n} conversations", "대화 {n}개"],
  countedOne: ["1 conversation", "대화 1개"],
  loadingMore: ["loading…", "불러오는 중…"],
  thereIsMore: ["there are more", "더 있음"],
  waiting: ["{n} more with news", "새 소식 {n}개 대기 중"],
  incomplete: ["some can't be listed", "일부는 표시할 수 없음"],
  dropped: ["the oldest are left out", "가장 오래된 것은 생략됨"],
  none: ["No conversations.", "대화가 없습니다."],
  moreRooms: ["More conversations", "더 보기"],
  newAbove: ["News above", "위에 새 소식"],
  listHelp: ["Arrow keys or j and k move, Enter opens.", "화살표 키나 j, k로 이동하고 Enter로 엽니다."],
  chooseRoom: ["Choose a conversation.", "대화를 선택하세요."],
  back: ["‹ Back", "‹ 목록"],
  takeOver: ["Take over", "맡기"],
  takeFrom: ["Take over from {user}", "{user}님에게서 넘겨받기"],
  release: ["Release", "담당 해제"],
  assign: ["Assign…", "배정…"],
  assignTo: ["Assign to", "담당자 배정"],
  assignNow: ["Assign", "배정"],
  user: ["User", "사용자"],
  close: ["Close", "닫기"],
  people: ["People", "참여자"],
  nobody: ["nobody", "없음"],
  assignedTo: ["looked after by {user}", "담당: {user}"],
  assignedToYou: ["looked after by you", "담당: 나"],
  assignedToNobody: ["looked after by nobody", "담당 없음"],
  hereAre: ["here: {users}", "접속: {users}"],
  hereCount: ["{n} here", "{n}명 접속"],
  you: ["you", "나"],
  andMore: ["{users} and {n} more", "{users} 외 {n}명"],
  alertMark: ["alert", "알림"],
  oneAlert: ["1 alert: {title}, {ago}", "알림 1건: {title}, {ago}"],
  someAlerts: ["{n} alerts. Newest: {title}, {ago}", "알림 {n}건. 최근: {title}, {ago}"],
  newAlert: ["Alert in {title}", "{title}에 알림이 있습니다"],
  openNewest: ["Open", "열기"],
  alertOf: ["{worker} raised an alert, {ago}.", "{worker}의 알림, {ago}."],
  showMessage: ["Show", "보기"],
  seenTo: ["Seen to", "확인함"],
  alertEnded: ["The alert has ended.", "알림을 확인했습니다."],
  newerAlert: ["A newer alert has come. Look at it first.", "새로운 알림이 왔습니다. 먼저 확인하세요."],
  noAlert: ["Somebody else has seen to it.", "다른 사람이 이미 확인했습니다."],
  notThere: ["The message is not there any more.", "메시지가 더 이상 없습니다."],
  unread: ["{n} unread", "안 읽음 {n}"],
  badMood: ["bad mood", "불만"],
  goodMood: ["good mood", "만족"],
  moodScore: ["mood {score}", "감정 {score}"],
  translation: ["Translation: {language}", "번역: {language}"],
  original: ["Original", "원문"],
  edited: ["edited", "수정됨"],
  deleted: ["This message was deleted.", "삭제된 메시지입니다."],
  sending: ["sending…", "보내는 중…"],
  waitingToSend: ["waits: {why}", "대기 중: {why}"],
  notSent: ["not sent: {why}", "전송 실패: {why}"],
  again: ["Send again", "다시 보내기"],
  cancel: ["Drop", "취소"],
  readBy: ["read by {users}", "읽음: {users}"],
  answerTo: ["to {user}: {text}", "{user}님에게: {text}"],
  anEarlier: ["an earlier message", "이전 메시지"],
  files: ["{n} files", "파일 {n}개"],
  oneFile: ["1 file", "파일 1개"],
  notText: ["(not a text)", "(텍스트 아님)"],
  typing: ["{users} is typing…", "{users}님이 입력 중…"],
  latest: ["Newest messages", "최근 메시지"],
  latestNew: ["Newest messages ({n} new)", "최근 메시지 (새 메시지 {n}개)"],
  loading: ["loading…", "불러오는 중…"],
  partial: ["History can't tell everything just now.", "지금은 기록을 모두 불러올 수 없습니다."],
  nothingYet: ["Nothing here yet.", "아직 메시지가 없습니다."],
  reply: ["Reply", "답장"],
  send: ["Send", "보내기"],
  cantRead: ["You can't read this conversation: {why}", "이 대화를 읽을 수 없습니다: {why}"],
  mute: ["Mute for an hour", "1시간 음소거"],
  unmute: ["Let write again", "음소거 해제"],
  remove: ["Remove", "내보내기"],
  addMember: ["Add as a member", "멤버로 추가"],
  mutedUntil: ["muted until {time}", "{time}까지 음소거"],
  isHere: ["here", "접속 중"],
  owner: ["owner", "소유자"],
  moderator: ["moderator", "관리자"],
  member: ["member", "멤버"],
  reader: ["reader", "읽기 전용"],
  banned: ["banned", "차단됨"],
  noPeople: ["Nobody is known here.", "알려진 참여자가 없습니다."],
  reallyRemove: ["Remove for good?", "정말 내보낼까요?"],
  shortcuts: ["Keyboard", "단축키"],
  singleKeys: ["Single letters work outside of fields", "입력란 밖에서 한 글자 단축키 사용"],
  keyMove: ["move in the list", "목록에서 이동"],
  keyOpen: ["open the conversation", "대화 열기"],
  keyBack: ["back to the list", "목록으로"],
  keyFind: ["search", "검색"],
  keyReply: ["reply", "답장"],
  keyTake: ["take over, or release", "맡기 또는 담당 해제"],
  keyAlert: ["open the newest alert", "최근 알림 열기"],
  keySeen: ["end the alert: seen to", "알림 확인"],
  keyHelp: ["this list", "이 목록"],
  // Errors
  forbidden: ["Not allowed: {detail}", "권한이 없습니다: {detail}"],
  noFollow: ["This token does not let its user follow {pattern}: it needs the right “follow” there.", "이 토큰으로는 {pattern} 대화를 볼 수 없습니다. follow 권한이 필요합니다."],
  rate_limited: ["Too much at once. Try again in {wait} s.", "요청이 너무 많습니다. {wait}초 뒤에 다시 시도하세요."],
  conflict: ["Somebody else has changed it meanwhile. Look at what is there now.", "그사이 다른 사람이 변경했습니다. 현재 상태를 확인하세요."],
  bad_request: ["That is not possible: {detail}", "할 수 없는 요청입니다: {detail}"],
  limit: ["A limit is reached: {detail}", "한도를 넘었습니다: {detail}"],
  too_large: ["Too large: {detail}", "너무 큽니다: {detail}"],
  unknown_room: ["Nobody has made this room.", "만들어지지 않은 대화방입니다."],
  unauthorized: ["The token is not valid any more.", "토큰이 더 이상 유효하지 않습니다."],
  unavailable: ["It can't be done just now. Try again.", "지금은 할 수 없습니다. 다시 시도하세요."],
  disconnected: ["The edge did not answer. Try again.", "서버가 응답하지 않았습니다. 다시 시도하세요."],
  removed: ["You were taken out of it.", "대화에서 제외되었습니다."],
  bannedYou: ["You were banned from it.", "차단되었습니다."],
  ended: ["It has ended.", "종료된 대화입니다."],
  failed: ["It failed: {detail} ({code})", "실패했습니다: {detail} ({code})"],
  // What natter tells of a room
  tellCreated: ["{by} made this room", "{by}님이 대화방을 만들었습니다"],
  tellAdded: ["{by} added {user}", "{by}님이 {user}님을 추가했습니다"],
  tellRole: ["{by} made {user} {role}", "{by}님이 {user}님을 {role}(으)로 지정했습니다"],
  tellMuted: ["{by} muted {user}", "{by}님이 {user}님을 음소거했습니다"],
  tellUnmuted: ["{by} let {user} write again", "{by}님이 {user}님의 음소거를 해제했습니다"],
  tellBanned: ["{by} banned {user}", "{by}님이 {user}님을 차단했습니다"],
  tellRemoved: ["{by} removed {user}", "{by}님이 {user}님을 내보냈습니다"],
  tellLeft: ["{user} left", "{user}님이 나갔습니다"],
  tellPinned: ["{by} pinned a message", "{by}님이 메시지를 고정했습니다"],
  tellUnpinned: ["{by} unpinned a message", "{by}님이 메시지 고정을 해제했습니다"],
  tellClosed: ["{by} ended this room", "{by}님이 대화방을 종료했습니다"],
  tellAlert: ["{by} raised an alert", "{by}의 알림"],
  tellSeen: ["{by} has seen to the alert", "{by}님이 알림을 확인했습니다"],
  tellTook: ["{by} took over", "{by}님이 대화를 맡았습니다"],
  tellAssigned: ["{by} gave the room to {user}", "{by}님이 {user}님에게 배정했습니다"],
  tellReleased: ["{by} gave the room to nobody", "{by}님이 담당을 해제했습니다"],
  tellTitle: ["{by} called the room “{title}”", "{by}님이 제목을 ‘{title}’(으)로 바꾸었습니다"],
  tellSettings: ["{by} changed the settings", "{by}님이 설정을 바꾸었습니다"],
  tellOther: ["{by} changed the room ({action})", "{by}님이 대화방을 변경했습니다 ({action})"],
};

export const lang = navigator.language.toLowerCase().startsWith("ko") ? "ko" : "en";
const place = lang === "ko" ? 1 : 0;

/** The words of this name, with `{…}` filled in. */
export function t(name, values = {}) {
  return WORDS[name][place].replace(/\{(\w+)\}/g, (_, key) => String(values[key] ?? ""));
}

/** Fills in what the page says from its attributes `data-t…`. */
export function translate(root) {
  document.documentElement.lang = lang;
  for (const [attribute, set] of [
    ["data-t", (node, text) => (node.textContent = text)],
    ["data-t-label", (node, text) => node.setAttribute("aria-label", text)],
    ["data-t-title", (node, text) => (node.title = text)],
    ["data-t-placeholder", (node, text) => (node.placeholder = text)],
  ]) {
    for (const node of root.querySelectorAll(`[${attribute}]`)) set(node, t(node.getAttribute(attribute)));
  }
}

// Times -------------------------------------------------------------------------------------------------------------------

const relative = new Intl.RelativeTimeFormat(lang, { numeric: "auto", style: "short" });
const clockFormat = new Intl.DateTimeFormat(lang, { hour: "2-digit", minute: "2-digit" });
const fullFormat = new Intl.DateTimeFormat(lang, { dateStyle: "medium", timeStyle: "medium" });
const dayFormat = new Intl.DateTimeFormat(lang, { weekday: "long", day: "numeric", month: "long", year: "numeric" });
const languages = new Intl.DisplayNames([lang], { type: "language", fallback: "code" });

const UNITS = [["day", 86_400_000], ["hour", 3_600_000], ["minute", 60_000]];

/** How long ago; what is newer than a minute is now. */
export function ago(ms) {
  const passed = Math.max(0, Date.now() - ms);
  const [unit, size] = UNITS.find(([, one]) => passed >= one) ?? ["second", Infinity];
  return relative.format(-Math.floor(passed / size) || 0, unit);
}

export const clock = (ms) => clockFormat.format(ms);
export const full = (ms) => fullFormat.format(ms);
export const day = (ms) => dayFormat.format(ms);

/** The name of a language; a code that is none stays as it is. */
export function languageName(code) {
  try {
    return languages.of(code) ?? code;
  } catch {
    return code;
  }
}

/** Names in a row: the first few, and how many more. */
export function names(users, most = 5) {
  if (users.length <= most) return users.join(", ");
  return t("andMore", { users: users.slice(0, most).join(", "), n: users.length - most });
}

// Sentences ---------------------------------------------------------------------------------------------------------------

/** An error of the edge or of the SDK. Its message is for developers, but it names what was wrong. */
export function sentence({ code, message = "", retryAfterMs = 1_000 }) {
  const detail = `${message}.`;
  switch (code) {
    case "rate_limited": return t(code, { wait: Math.ceil(retryAfterMs / 1_000) });
    case "forbidden": case "limit": case "too_large": return t(code, { detail });
    case "bad_request": case "bad_id": case "bad_room": case "unknown_namespace": return t("bad_request", { detail });
    case "conflict": case "unknown_room": case "unauthorized": case "removed": return t(code);
    case "banned": return t("bannedYou");
    case "closed": return t("ended");
    case "unavailable": case "unknown_outcome": return t("unavailable");
    case "disconnected": case "timeout": return t("disconnected");
    default: return t("failed", { detail: message, code });
  }
}

/** What a room is called. */
export function titleOf({ title, kind, peers, ref, room }) {
  if (title) return title;
  if (kind === "dm" && peers?.length > 0) return peers.join(", ");
  return ref || room;
}

/** A user who is a worker, as people call it. */
const who = (user) => (user ?? "").replace(/^\$worker\./, "");

/** An entry of kind `system`: what was changed about the room, and by whom. */
export function told(body) {
  const { action, user, role, title, assignee, alert } = body ?? {};
  const by = who(body?.by);
  const simple = {
    created: "tellCreated", added: "tellAdded", muted: "tellMuted", unmuted: "tellUnmuted", banned: "tellBanned",
    removed: "tellRemoved", left: "tellLeft", pinned: "tellPinned", unpinned: "tellUnpinned", closed: "tellClosed", alert: "tellAlert",
  };
  if (simple[action]) return t(simple[action], { by, user });
  if (action === "role") return t("tellRole", { by, user, role: role in WORDS ? t(role) : role });
  if (action !== "settings") return t("tellOther", { by, action });
  if (alert === false) return t("tellSeen", { by });
  if (assignee === body.by) return t("tellTook", { by });
  if (assignee) return t("tellAssigned", { by, user: assignee });
  if (assignee === "") return t("tellReleased", { by });
  if (title) return t("tellTitle", { by, title });
  return t("tellSettings", { by });
}

/** What a message says, in one text; `""` where there is nothing. */
export function textOf(body) {
  if (typeof body === "string") return body;
  if (typeof body?.text === "string") return body.text;
  return body == null || Array.isArray(body.attachments) ? "" : t("notText");
}

export function element(name, className, content = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.textContent = content;
  return made;
}

export function button(className, content, act) {
  const made = element("button", className, content);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}
